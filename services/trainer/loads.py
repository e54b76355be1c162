"""Loading checkpoints: a run goes on, or begins, with the state that another one has saved.

The checkpoint is turned into a snapshot of the run, and the run's record is pointed to it; at that moment it is loaded,
for this trainer and any that takes over, which needs the checkpoint no more. What was in memory is dropped, and the
run comes back from its snapshot before its next operation, as a run does that had to leave. Until that moment the run
is as it was.
"""

from __future__ import annotations

import asyncio

import msgspec

from services.trainer.engine_thread import EngineThread
from services.trainer.held import HeldRun
from services.trainer.places import Places
from services.trainer.residency import Level
from services.trainer.snapshots import Snapshots
from shared.checkpoints import Checkpoints, path_of
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord
from shared.contracts.policies import LoraSpec
from shared.errors import PermanentError, UserError
from shared.node import Node


class Loads:
    """Loads checkpoints into runs."""

    def __init__(
        self, node: Node, engine: EngineThread, places: Places, snapshots: Snapshots, executing: asyncio.Lock
    ) -> None:
        """`executing` is held by whoever moves runs."""
        self._node = node
        self._engine = engine
        self._places = places
        self._snapshots = snapshots
        self._executing = executing
        self._checkpoints = Checkpoints(node.bus, node.blobs)

    async def load(self, held: HeldRun, source: CheckpointKey, *, optimizer: bool) -> None:
        """Replace a run's state, or give it its first. Raise `MeshError`; the run is then as it was."""
        if held.level is Level.NOWHERE and held.backlog.next_seq > 0:
            raise UserError(f"run {held.name} was not created: begin another one")
        record = await self._found(source)
        self._check(record, held)
        state = await self._read(record)
        begun = await asyncio.to_thread(self._engine.engine.begun_from, state, held.record.lora, optimizer=optimizer)
        await self._snapshots.replace(held, begun)
        async with self._executing:
            await self._places.replaced(held)

    async def _found(self, source: CheckpointKey) -> CheckpointRecord:
        entry = await self._checkpoints.find(source)
        if entry is None:
            raise UserError(f"there is no checkpoint {path_of(source)} (any more): save it first")
        return entry.value

    def _check(self, record: CheckpointRecord, held: HeldRun) -> None:
        path = path_of(record.key)
        if record.state is None:
            raise UserError(
                f"{path} holds no state to train on: load one that save_state wrote, tinker://RUN/weights/NAME"
            )
        if record.base_model != held.record.base_model:
            raise UserError(
                f"{path} is of base model {record.base_model!r} and cannot be loaded into a run of "
                f"{held.record.base_model!r}: begin a run of that model"
            )
        if _shape(record.lora) != _shape(held.record.lora):
            raise UserError(
                f"{path} has an adapter of another shape ({_words(record.lora)}) than the run has "
                f"({_words(held.record.lora)}): begin a run from it"
            )

    async def _read(self, record: CheckpointRecord) -> bytes:
        assert record.state is not None
        try:
            return await self._node.blobs.get(record.state)
        except PermanentError as error:
            now = await self._checkpoints.find(record.key)
            if now is not None and now.value.state == record.state:
                raise
            raise UserError(f"{path_of(record.key)} was deleted or replaced while it was loaded: try again") from error


def _shape(lora: LoraSpec) -> LoraSpec:
    """What must agree: all but how the weights began."""
    return msgspec.structs.replace(lora, seed=None)


def _words(lora: LoraSpec) -> str:
    parts = [name for name in ("attn", "mlp", "unembed") if getattr(lora, f"train_{name}")]
    return f"rank {lora.rank}, alpha {lora.alpha:g}, {' and '.join(parts) or 'nothing'} trained"
