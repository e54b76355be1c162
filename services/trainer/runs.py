"""The runs that a trainer holds: claimed by lease, brought back from snapshot and log, written down, let go.

Runs are claimed by trainers rather than placed by somebody: a killed trainer's runs are taken over as soon as its
leases have expired, without anybody to notice and decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable

from services.trainer.backlog import Backlog, Offered
from services.trainer.config import TrainerConfig
from services.trainer.engine_thread import EngineThread
from services.trainer.held import HeldRun
from services.trainer.metrics import TrainerMetrics
from shared import topology
from shared.bus import Delivery
from shared.contracts.training import AnyOperation, RunRecord, SnapshotRecord
from shared.errors import MeshError, PermanentError
from shared.leases import Key, Leases
from shared.node import Node
from shared.tasks import cancelled

log = logging.getLogger(__name__)

CLAIM_SECONDS = 1.0


class Runs:
    """Claims runs, reads their logs, writes their snapshots."""

    def __init__(
        self,
        node: Node,
        config: TrainerConfig,
        engine: EngineThread,
        metrics: TrainerMetrics,
        on_repeated: Callable[[Delivery[AnyOperation]], Awaitable[None]],
        settled: Callable[[str], Awaitable[None]],
        on_gone: Callable[[str], None],
    ) -> None:
        """`on_repeated` answers an operation that was executed before this trainer read it.

        `settled` waits until all answers of a run are stored. `on_gone` hears of each run that is no longer held.
        """
        self.held: dict[str, HeldRun] = {}
        self.work = asyncio.Event()
        """Set when there may be something new to execute."""
        self._node = node
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._on_repeated = on_repeated
        self._settled = settled
        self._on_gone = on_gone
        self._table = node.bus.table(topology.RUNS)
        self._known: dict[str, RunRecord] = {}
        self._leases = Leases(node.bus, node.replica, node.tasks, self._lost)
        self._claiming = asyncio.Event()
        self._looking: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look for runs."""
        self._leases.start()
        self._looking = [
            self._node.tasks.start("runs", self._watch()),
            self._node.tasks.start("claims", self._claim_for_ever()),
        ]

    async def stop(self) -> None:
        """Write down and let go of everything, and claim nothing more."""
        await cancelled(self._looking)
        for name in list(self.held):
            held = self.held[name]
            if held.done_since_snapshot and held.broken is None:
                await self.write_snapshot(name)
            await self._let_go(name)

    async def write_snapshot(self, name: str) -> None:
        """Write a run's state to the blob store, then cut its log up to there. Never raises `MeshError`."""
        held = self.held[name]
        seq, place = held.backlog.next_seq - 1, held.backlog.replay_from
        await self._settled(name)  # what is cut off the log can never be answered again
        try:
            state = await self._engine.call(self._engine.engine.snapshot, name)
            ref = await self._node.blobs.put(_state_key(name, seq, state), state)
            before = held.record.snapshot
            if await self._record_snapshot(held, SnapshotRecord(seq=seq, stream_seq=place, state=ref)):
                held.done_since_snapshot, held.snapshot_at = 0, time.monotonic()
                self._metrics.snapshots.labels("written").inc()
                await self._node.bus.purge(topology.OPERATIONS, up_to=place, run=name)
                if before is not None and before.state.key != ref.key:
                    await self._node.blobs.delete(before.state.key)
        except MeshError as error:
            # The log still has everything since the snapshot before: recovery is only slower.
            self._metrics.snapshots.labels("failed").inc()
            held.snapshot_at = time.monotonic()
            log.warning("snapshot of run %s could not be written: %s", name, error)

    def snapshot_is_due(self, name: str) -> bool:
        """Whether enough was done since the last one."""
        held = self.held[name]
        old = time.monotonic() - held.snapshot_at > self._config.snapshot_seconds
        return held.done_since_snapshot >= self._config.snapshot_operations or (old and held.done_since_snapshot > 0)

    async def _record_snapshot(self, held: HeldRun, snapshot: SnapshotRecord) -> bool:
        """Point the run's record to a snapshot, unless the run is no longer ours."""
        name = held.record.run
        while self.held.get(name) is held:
            record = _with_snapshot(held.record, snapshot)
            revision = await self._table.update(name, record, held.revision)
            if revision is not None:
                held.record, held.revision = record, revision
                return True
            entry = await self._table.get(name)  # its owner changed it meanwhile, for instance closed it
            if entry is None or entry.value.snapshot != held.record.snapshot:
                return False  # somebody else holds the run, and has written a snapshot of it
            held.record, held.revision = entry.value, entry.revision
        return False

    async def _watch(self) -> None:
        async for change in self._table.changes():
            name, record = change.key[0], change.value
            if record is None or record.base_model != self._config.base_model:
                continue
            if record.closed:
                self._known.pop(name, None)
                if name in self.held:
                    await self._let_go(name)
            elif name not in self.held:
                self._known[name] = record
                self._claiming.set()

    async def _claim_for_ever(self) -> None:
        while True:
            # Again every second: the lease of a killed trainer expires without a word.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLAIM_SECONDS):
                    await self._claiming.wait()
            self._claiming.clear()
            for name in list(self._known):
                if name in self.held or len(self.held) >= self._config.max_runs:
                    continue
                try:
                    await self._claim(name)
                except MeshError as error:
                    log.warning("run %s could not be claimed: %s", name, error)

    async def _claim(self, name: str) -> None:
        if not await self._leases.claim(("run", name)):
            return
        entry = await self._leases.releasing_on_error(("run", name), self._table.get(name))
        if entry is None or entry.value.closed:
            self._known.pop(name, None)
            await self._leases.release(("run", name))
            return
        work = self._restored(entry.value, entry.revision)
        held = await self._leases.releasing_on_error(("run", name), work)
        self.held[name] = held
        log.info("run %s is ours, from operation %d", name, held.backlog.next_seq)
        held.reader = self._node.tasks.start(f"log of {name}", self._read(name, held))

    async def _restored(self, record: RunRecord, revision: int) -> HeldRun:
        if (snapshot := record.snapshot) is None:
            return HeldRun(record, revision, Backlog())
        held = HeldRun(record, revision, Backlog(next_seq=snapshot.seq + 1, read_up_to=snapshot.stream_seq))
        try:
            state = await self._node.blobs.get(snapshot.state)
            await self._engine.call(self._engine.engine.restore, record.run, state)
        except PermanentError as error:
            log.error("run %s cannot be brought back: %s", record.run, error)
            held.broken = error
        return held

    async def _read(self, name: str, held: HeldRun) -> None:
        async for delivery in self._node.bus.follow(topology.OPERATIONS, after=held.backlog.read_up_to, run=name):
            operation = delivery.message
            offered = held.backlog.offer(operation.seq, delivery, delivery.seq)
            if offered is Offered.DONE_BEFORE:
                await self._on_repeated(delivery)
            self.work.set()
            # The rest waits in the log; unless the next seq is not there yet, then it must be looked for.
            while len(held.backlog.waiting) >= self._config.max_backlog and held.backlog.head is not None:
                held.room.clear()
                await held.room.wait()

    def _lost(self, key: Key) -> None:
        self._metrics.leases_lost.inc()
        self._node.tasks.start(f"drop {key[1]}", self._forget(key[1]))

    async def _let_go(self, name: str) -> None:
        await self._forget(name)
        await self._leases.release(("run", name))

    async def _forget(self, name: str) -> None:
        held = self.held.pop(name, None)
        if held is None:
            return
        self._on_gone(name)
        if held.reader is not None:
            await cancelled([held.reader])
        await self._engine.call(self._engine.engine.drop_run, name)


def _with_snapshot(record: RunRecord, snapshot: SnapshotRecord) -> RunRecord:
    return RunRecord(
        run=record.run,
        base_model=record.base_model,
        lora=record.lora,
        owner=record.owner,
        snapshot=snapshot,
        closed=record.closed,
    )


def _state_key(run: str, seq: int, state: bytes) -> str:
    # The content is in the name: a replay that comes to the same seq with another last bit does not collide.
    return f"snapshots/{topology.token(run)}/{seq}-{hashlib.sha256(state).hexdigest()[:12]}.safetensors"
