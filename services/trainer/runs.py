"""The runs that a trainer holds: claimed by lease, their logs read, let go.

Runs are claimed by trainers rather than placed by somebody: a killed trainer's runs are taken over as soon as its
leases have expired, without anybody to notice and decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from services.trainer.backlog import Backlog
from services.trainer.config import TrainerConfig
from services.trainer.engine_thread import EngineThread
from services.trainer.held import HeldRun
from services.trainer.logs import Logs
from services.trainer.metrics import TrainerMetrics
from services.trainer.residency import Level
from services.trainer.snapshots import Snapshots
from shared import topology
from shared.bus import Delivery
from shared.contracts.training import AnyOperation, RunRecord
from shared.errors import MeshError
from shared.leases import Key, Leases
from shared.node import Node
from shared.tables import Entry
from shared.tasks import cancelled

log = logging.getLogger(__name__)

CLAIM_SECONDS = 1.0


class Runs:
    """Claims runs and lets them go."""

    def __init__(
        self,
        node: Node,
        config: TrainerConfig,
        engine: EngineThread,
        metrics: TrainerMetrics,
        held: dict[str, HeldRun],
        snapshots: Snapshots,
        logs: Logs,
        on_gone: Callable[[str], None],
    ) -> None:
        """Keep the runs in `held`. `on_gone` hears of each run that is no longer held."""
        self.held = held
        self._node = node
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._snapshots = snapshots
        self._logs = logs
        self._on_gone = on_gone
        self._table = node.bus.table(topology.RUNS)
        self._known: dict[str, RunRecord] = {}
        self._leases = Leases(node.bus, node.replica, node.tasks, self._lost)
        self._claiming = asyncio.Event()
        self._leaving: set[str] = set()
        """Runs not to be claimed again before the engine has dropped them."""
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
        for name, held in list(self.held.items()):
            if self._snapshots.is_needed(held):
                await self._snapshots.write(held)
            await self._let_go(name)

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
            self._logs.give_up_missing(self.held.values())
            for name in list(self._known):
                if name in self.held or name in self._leaving or len(self.held) >= self._config.max_runs:
                    continue
                try:
                    await self._claim(name)
                except MeshError as error:
                    log.warning("run %s could not be claimed: %s", name, error, extra={"run": name})

    async def _claim(self, name: str) -> None:
        if not await self._leases.claim(("run", name)):
            return
        entry, newest = await self._leases.releasing_on_error(("run", name), self._look_at(name))
        if entry is None or entry.value.closed:
            self._known.pop(name, None)
            await self._leases.release(("run", name))
            return
        held = _unloaded(entry.value, entry.revision)
        held.newest_when_claimed = newest
        self.held[name] = held
        log.info("run %s is ours, from operation %d", name, held.backlog.next_seq, extra={"run": name})
        held.reader = self._node.tasks.start(f"log of {name}", self._logs.read(held))

    async def _look_at(self, name: str) -> tuple[Entry[RunRecord] | None, int]:
        """A run's record, and the place of its newest operation."""
        return await self._table.get(name), await self._node.bus.last_place(topology.OPERATIONS, run=name)

    def _lost(self, key: Key) -> None:
        self._metrics.leases_lost.inc()
        self._node.tasks.start(f"drop {key[1]}", self._let_go(key[1]))

    async def _let_go(self, name: str) -> None:
        self._leaving.add(name)
        try:
            await self._forget(name)
            await self._leases.release(("run", name))
        finally:
            self._leaving.discard(name)

    async def _forget(self, name: str) -> None:
        held = self.held.pop(name, None)
        if held is None:
            return
        self._on_gone(name)
        await cancelled(task for task in (held.reader, held.aside) if task is not None)
        await self._engine.call(self._engine.engine.drop_run, name)


def _unloaded(record: RunRecord, revision: int) -> HeldRun:
    """The run as its record has it; its state is read when it is first needed."""
    if (snapshot := record.snapshot) is None:
        return HeldRun(record, revision, Backlog())
    backlog: Backlog[Delivery[AnyOperation]] = Backlog(next_seq=snapshot.seq + 1, read_up_to=snapshot.stream_seq)
    return HeldRun(record, revision, backlog, level=Level.STORE, size=snapshot.state.size)
