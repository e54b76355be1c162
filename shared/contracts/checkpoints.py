"""Checkpoints: what a run has saved under a name."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shared.contracts.base import Contract
from shared.contracts.blobs import BlobRef
from shared.contracts.policies import LoraSpec, PolicyRef

CheckpointKind = Literal["training", "sampler", "external"]
"""`training`: weights and optimizer, to go on from. `sampler`: a policy, to sample from. `external`: an adapter's
files, to download."""

CHECKPOINT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,126}$"
"""No slash and no leading dot: a name is never a path."""

CheckpointName = Annotated[
    str, msgspec.Meta(pattern=CHECKPOINT_NAME, description="letters, digits, '.', '_' and '-', 127 at most")
]


class SaveSpec(Contract):
    """How to record what an operation saves."""

    name: CheckpointName
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """None: it never expires."""
    overwrite: bool = False
    """Replace one of the same kind and name. Otherwise that is an error."""
    user_metadata: dict[str, str] = {}


class CheckpointKey(Contract):
    """Names a checkpoint."""

    run: str
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"{self.run}/{self.kind}/{self.name}"


class CheckpointRecord(Contract):
    """A checkpoint as the `checkpoints` bucket knows it. Its key there is (run, kind, name)."""

    key: CheckpointKey
    base_model: str
    lora: LoraSpec
    owner: str
    seq: int
    """The operation that saved it: the same one, done again after a crash, finds its own work."""
    created: float
    """Seconds since the epoch."""
    size: int
    """Bytes of all its blobs."""
    state: BlobRef | None = None
    """`training`: what `CreateRun` and `LoadState` read."""
    policy: PolicyRef | None = None
    """`sampler`: what samplers read."""
    files: dict[str, BlobRef] = {}
    """`sampler` and `external`: the adapter's files by name; an external one may be encrypted."""
    encrypted: bool = False
    expires: float | None = None
    """Seconds since the epoch. None: never."""
    public: bool = False
    """Everybody may read it."""
    user_metadata: dict[str, str] = {}
