"""What the trainer asks of an engine: plain data in, plain data out, no bus and no clock.

An engine holds one frozen base model and any number of runs (adapters with their optimizers). All calls are
synchronous and come from one thread. A call that raises `UserError` for a run leaves that run as it was; other runs
never notice. Runs that have nothing to do can be parked in host memory, to leave the device's to others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shared.contracts.arrays import Float32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossSpec
from shared.errors import MeshError, UserError


class NoRoom(UserError):
    """The device has no memory for a run now. Nothing was changed; with other runs parked it may work."""


@dataclass(frozen=True)
class PassItem:
    """One run's part in a forward and backward pass: an operation, or some neighbouring data of one.

    The parts of an operation come in order, in passes of their own, with no other call for the run between them.
    """

    run: str
    data: Sequence[Datum]
    loss: LossSpec
    forward_only: bool = False
    first: bool = True
    """Whether the operation begins with it. Parts of an earlier one that was not finished are forgotten."""
    rest: Sequence[Datum] = ()
    """The operation's data that come in later parts. The first part fails if they are wrong."""


@dataclass(frozen=True)
class PassOutcome:
    """What one run got out of a pass: either an error, with its gradient as before, or all of the rest.

    A part that others follow gives neither metrics nor logprobs; the last one gives those of the whole operation. An
    error in any part is the whole operation's: its other parts are forgotten, and the run is as before the first.
    """

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
        """Begin a run with a fresh adapter: A from `lora.seed`, B zero.

        Raise `NoRoom`, or `UserError` if it exists or trains nothing.
        """

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
        """Bring a run back from `snapshot`, replacing what is there.

        Raise `NoRoom`, or `PermanentError` if the state is not one of this model's.
        """

    def begun_from(self, state: bytes, lora: LoraSpec, *, optimizer: bool) -> bytes:
        """What `snapshot` would give of a run that begins with the weights of `state`, without a gathered gradient.

        With `optimizer` it goes on with that of `state`. Touches no run and no device, so any thread may call it beside
        all else. Raise `UserError` if the adapter in `state` has another shape than `lora`, `PermanentError` if the
        state is not one of this model's.
        """

    def park(self, run: str) -> None:
        """Move all of a run to host memory, unfinished parts too. Unknown and parked runs stay as they are."""

    def bring_back(self, run: str) -> None:
        """Move a parked run to the device, bit for bit; any other call that needs it there does so too.

        Raise `NoRoom`. Unknown runs and those on the device stay as they are.
        """

    def size_of(self, run: str) -> int:
        """Bytes of a run's state, wherever it is. Raise `UserError` for an unknown run."""

    def drop_run(self, run: str) -> None:
        """Forget a run and free its memory. Unknown runs are ignored."""
