"""Policies: immutable snapshots of a run that can be sampled."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shared.contracts.base import Contract, Strict
from shared.contracts.blobs import BlobRef

MAX_RANK = 128


class LoraSpec(Strict):
    """Shape of a low-rank adapter (Hu et al. 2021, arXiv:2106.09685): W + alpha / rank * B @ A."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)] = 16
    alpha: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 32.0
    """Fixed at 32 for any rank by "LoRA Without Regret" (Schulman et al. 2025), so that the best learning rate hardly
    depends on the rank."""
    seed: int | None = None
    """Fixes the initial A. None: 0, so that runs are reproducible unless asked otherwise."""
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False
    """Also adapt the unembedding. Off by default in jobs, since it costs a product with the whole vocabulary."""


class PolicyRef(Contract):
    """`run@version`: names a policy, never the newest one."""

    run: str
    version: int

    def __str__(self) -> str:
        return f"{self.run}@{self.version}"


class PolicyRecord(Contract):
    """A policy as it stands in the blob store; the value in the `policies` bucket, written once."""

    policy: PolicyRef
    base_model: str
    lora: LoraSpec
    config: BlobRef
    """PEFT's adapter_config.json."""
    weights: BlobRef
    """PEFT's adapter_model.safetensors."""
    owner: str = "default"


class PolicyPublished(Contract):
    """A new policy can be sampled (event)."""

    record: PolicyRecord
    seq: int
    """The operation after which the weights were taken."""
