"""What the trainer asks of an engine: plain data in, plain data out, no bus and no clock.

An engine holds one frozen base model and any number of runs (adapters with their optimizers). All calls are
synchronous and come from one thread. A call that raises `UserError` for a run leaves that run as it was; other runs
never notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shared.contracts.arrays import Float32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossSpec
from shared.errors import MeshError


@dataclass(frozen=True)
class PassItem:
    """One run's part in a forward and backward pass."""

    run: str
    data: Sequence[Datum]
    loss: LossSpec
    forward_only: bool = False


@dataclass(frozen=True)
class PassOutcome:
    """What one run got out of a pass: either an error, with its gradient as before, or all of the rest."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """`loss:sum` and others, each named `what:reduction`."""
    logprobs: Sequence[Float32s] = ()
    """Of the targets, and as many: one array of N, or of N * K, for each datum."""
    error: MeshError | None = None


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step gave: `grad_norm:mean` (before clipping), `update_norm:mean`, `step:max`."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    error: MeshError | None = None


class TrainerEngine(Protocol):
    """One base model, many runs."""

    @property
    def base_model(self) -> str:
        """Name under which runs ask for this model."""

    @property
    def runs(self) -> frozenset[str]:
        """Runs that are present."""

    def create_run(self, run: str, lora: LoraSpec) -> None:
        """Begin a run with a fresh adapter: A from `lora.seed`, B zero. Raise `UserError` if it cannot be held."""

    def forward_backward(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """Run sequences of many runs through one forward and backward pass; gradients add to each run's own.

        The outcomes are in the order of `items`. A run may appear once.
        """

    def optim_step(self, steps: Mapping[str, AdamParams]) -> dict[str, StepOutcome]:
        """Apply AdamW to each run's gathered gradient and clear it.

        Without a gradient nothing changes but the count.
        """

    def export_adapter(self, run: str) -> dict[str, bytes]:
        """The run's weights as PEFT's files, `adapter_config.json` and `adapter_model.safetensors`, by name."""

    def snapshot(self, run: str) -> bytes:
        """Everything of a run: weights, optimizer, gathered gradient, step count. A safetensors file."""

    def restore(self, run: str, state: bytes) -> None:
        """Bring a run back from `snapshot`, replacing what is there. Raise `PermanentError` if it does not fit."""

    def drop_run(self, run: str) -> None:
        """Forget a run and free its memory. Unknown runs are ignored."""
