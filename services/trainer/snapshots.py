"""Snapshots of runs: written to the blob store, recorded in the `runs` bucket, read when a run is needed again.

A snapshot is the state after the last operation that is done. Of an operation in the middle of its parts it has
nothing, so a replay does that operation from its first datum, once.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from services.trainer.config import TrainerConfig
from services.trainer.engine_thread import EngineThread
from services.trainer.held import HeldRun
from services.trainer.metrics import TrainerMetrics
from services.trainer.residency import Level
from shared import topology
from shared.contracts.blobs import BlobRef
from shared.contracts.training import SnapshotRecord
from shared.errors import MeshError, TemporaryError
from shared.node import Node

log = logging.getLogger(__name__)


class Snapshots:
    """Writes and reads the snapshots of the runs held."""

    def __init__(
        self,
        node: Node,
        config: TrainerConfig,
        engine: EngineThread,
        metrics: TrainerMetrics,
        held: Mapping[str, HeldRun],
        settled: Callable[[str], Awaitable[None]],
    ) -> None:
        """`settled` waits until all answers of a run are stored."""
        self._node = node
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._held = held
        self._settled = settled
        self._table = node.bus.table(topology.RUNS)

    def is_due(self, held: HeldRun) -> bool:
        """Whether enough was done since the last one."""
        old = time.monotonic() - held.snapshot_at > self._config.snapshot_seconds
        return self.is_needed(held) and (old or held.done_since_snapshot >= self._config.snapshot_operations)

    def is_needed(self, held: HeldRun) -> bool:
        """Whether the run has state that no snapshot has."""
        in_memory = held.level in (Level.DEVICE, Level.HOST)
        return in_memory and held.broken is None and held.done_since_snapshot > 0

    async def write(self, held: HeldRun) -> bool:
        """Write a run's state to the blob store, then cut its log up to there. Never raises `MeshError`.

        False: it could not be written, or the run is no longer ours.
        """
        seq, place = held.backlog.next_seq - 1, held.backlog.replay_from
        try:
            state = await self._engine.call(self._engine.engine.snapshot, held.name)
            if not await self._put(held, seq, place, state):
                return False
        except MeshError as error:
            # The log still has everything since the snapshot before: recovery is only slower.
            self._metrics.snapshots.labels("failed").inc()
            held.snapshot_at = time.monotonic()
            log.warning("snapshot of run %s could not be written: %s", held.name, error, extra={"run": held.name})
        return held.record.snapshot is not None and held.done_since_snapshot == 0

    async def replace(self, held: HeldRun, state: bytes) -> None:
        """Make `state` what the run is after its head, which still waits to be answered.

        The record is what counts, at once and for whoever takes over. Raise `MeshError`: nothing was changed.
        """
        # Replay begins at the head, so that whoever takes over answers it, if nobody has.
        if not await self._put(held, held.backlog.next_seq, held.backlog.replay_from, state):
            raise TemporaryError(f"run {held.name} is no longer ours")

    async def _put(self, held: HeldRun, seq: int, place: int, state: bytes) -> bool:
        await self._settled(held.name)  # what is cut off the log can never be answered again
        ref = await self._node.blobs.put(_state_key(held.name, seq, state), state)
        before = await self._record(held, SnapshotRecord(seq=seq, stream_seq=place, state=ref))
        if before is None:
            return False
        held.done_since_snapshot, held.snapshot_at = 0, time.monotonic()
        self._metrics.snapshots.labels("written").inc()
        try:
            await self._node.bus.purge(topology.OPERATIONS, up_to=place, run=held.name)
            for old in before:
                if old.key != ref.key:
                    await self._node.blobs.delete(old.key)
        except MeshError as error:  # only space is lost
            log.warning("what a snapshot of run %s replaces stays: %s", held.name, error, extra={"run": held.name})
        return True

    async def read(self, held: HeldRun) -> bytes:
        """The state in a run's newest snapshot. Raise `PermanentError` or `TemporaryError`."""
        snapshot = held.record.snapshot
        assert snapshot is not None, f"run {held.name} has no snapshot"
        return await self._node.blobs.get(snapshot.state)

    async def _record(self, held: HeldRun, snapshot: SnapshotRecord) -> list[BlobRef] | None:
        """Point the run's record to a snapshot. Return what it pointed to; None: the run is no longer ours.

        A record only ever goes forward: who has lost the run without noticing does not undo what the new holder wrote.
        """
        name = held.name
        while self._held.get(name) is held:
            before = held.record.snapshot
            record = msgspec.structs.replace(held.record, snapshot=snapshot)
            revision = await self._table.update(name, record, held.revision)
            if revision is not None:
                held.record, held.revision = record, revision
                return [] if before is None else [before.state]
            entry = await self._table.get(name)  # its owner changed it meanwhile, for instance closed it
            if entry is None or entry.value.closed:
                return None
            there = entry.value.snapshot
            if there != before and there != snapshot and there is not None and there.seq >= snapshot.seq:
                return None  # somebody else holds the run
            held.record, held.revision = entry.value, entry.revision
            if there == snapshot:  # our own write, whose answer was lost
                return [] if before is None else [before.state]
        return None


def _state_key(run: str, seq: int, state: bytes) -> str:
    # The content is in the name: a replay that comes to the same seq with another last bit does not collide.
    return f"snapshots/{topology.token(run)}/{seq}-{hashlib.sha256(state).hexdigest()[:12]}.safetensors"
