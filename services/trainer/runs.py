"""The runs that a trainer holds: claimed by lease, their logs read, let go.

Runs are claimed by trainers rather than placed by somebody: a killed trainer's runs are taken over as soon as its
leases have expired, without anybody to notice and decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from services.trainer.backlog import Backlog, Offered
from services.trainer.config import TrainerConfig
from services.trainer.engine_thread import EngineThread
from services.trainer.held import HeldRun
from services.trainer.metrics import TrainerMetrics
from services.trainer.residency import Level
from services.trainer.snapshots import Snapshots
from services.trainer.unreadable import seq_of
from shared import topology
from shared.bus import Delivery
from shared.contracts.training import AnyOperation, RunRecord
from shared.errors import MeshError, PermanentError, UserError
from shared.leases import Key, Leases
from shared.node import Node
from shared.tables import Stored
from shared.tasks import cancelled

log = logging.getLogger(__name__)

CLAIM_SECONDS = 1.0
AHEAD_WHEN_STUCK = 16
"""How many times `max_backlog` is read ahead to find an operation that later ones have overtaken."""


class Runs:
    """Claims runs and reads their logs."""

    def __init__(
        self,
        node: Node,
        config: TrainerConfig,
        engine: EngineThread,
        metrics: TrainerMetrics,
        held: dict[str, HeldRun],
        snapshots: Snapshots,
        on_repeated: Callable[[Delivery[AnyOperation]], Awaitable[None]],
        refuse: Callable[[Delivery[AnyOperation], MeshError], None],
        on_gone: Callable[[str], None],
    ) -> None:
        """Keep the runs in `held`.

        `on_repeated` answers an operation that was executed before this trainer read it, `refuse` one that will not
        be. `on_gone` hears of each run that is no longer held.
        """
        self.held = held
        self.work = asyncio.Event()
        """Set when there may be something new to execute."""
        self._node = node
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._snapshots = snapshots
        self._on_repeated = on_repeated
        self._refuse = refuse
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
            self._give_up_missing()
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
        held = _unloaded(entry.value, entry.revision)
        self.held[name] = held
        log.info("run %s is ours, from operation %d", name, held.backlog.next_seq)
        held.reader = self._node.tasks.start(f"log of {name}", self._read(name, held))

    async def _read(self, name: str, held: HeldRun) -> None:
        async def unreadable(raw: Stored, error: PermanentError) -> None:
            self._pass_over(held, raw, error)

        after = held.backlog.read_up_to
        log_of_run = self._node.bus.follow(topology.OPERATIONS, after=after, on_unreadable=unreadable, run=name)
        async for delivery in log_of_run:
            await self._take_in(held, delivery)
            self.work.set()
            while len(held.backlog.waiting) >= self._most_waiting(held):
                held.room.clear()
                await held.room.wait()

    async def _take_in(self, held: HeldRun, delivery: Delivery[AnyOperation]) -> None:
        operation = delivery.message
        if operation.run != held.name:
            held.backlog.pass_over(delivery.seq)  # its seq is one of that run's
            self._refuse(delivery, UserError(f"it says that it is of run {operation.run!r}, not {held.name!r}"))
            return
        offered = held.backlog.offer(operation.seq, delivery, delivery.seq)
        if offered is Offered.HOLE:
            text = f"its seq {operation.seq} was used up by a message that could not be read: send it with a later one"
            self._refuse(delivery, UserError(text))
        elif offered is Offered.DONE_BEFORE and held.broken is not None:
            self._refuse(delivery, held.broken)
        elif offered is Offered.DONE_BEFORE:
            await self._on_repeated(delivery)

    def _pass_over(self, held: HeldRun, raw: Stored, error: PermanentError) -> None:
        """A message that cannot be read uses up its seq, as any failed operation does."""
        seq = seq_of(held.name, raw.msg_id, raw.body, raw.headers)
        log.error("run %s: the message of operation %s cannot be read: %s", held.name, seq, error)
        if seq is None:
            held.backlog.pass_over(raw.seq)
        else:
            held.backlog.offer(seq, None, raw.seq)
        self.work.set()

    def _most_waiting(self, held: HeldRun) -> int:
        """The rest waits in the log; unless the next seq is not there yet, then it must be looked for, further on."""
        return self._config.max_backlog * (AHEAD_WHEN_STUCK if held.backlog.is_stuck else 1)

    def _give_up_missing(self) -> None:
        """Fail the runs whose next operation has not come for too long, rather than wait for ever."""
        now = time.monotonic()
        for held in self.held.values():
            backlog = held.backlog
            if not backlog.is_stuck:
                continue
            if held.stuck[0] != backlog.next_seq:
                held.stuck = (backlog.next_seq, now)
            full = len(backlog.waiting) >= self._most_waiting(held)
            if held.broken is None and (full or now - held.stuck[1] > self._config.missing_seconds):
                held.broken = _missing(held, now)
                log.error("%s", held.broken)
            if held.broken is not None:
                backlog.skip_missing()
                self.work.set()

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


def _missing(held: HeldRun, now: float) -> UserError:
    seq, since = held.stuck
    return UserError(
        f"run {held.name}: operation {seq} has not come in {now - since:.0f} s, though {len(held.backlog.waiting)} "
        "later ones have; it was never sent, or its message is lost. The run cannot go on: begin another one, from a "
        "checkpoint if there is one"
    )


def _unloaded(record: RunRecord, revision: int) -> HeldRun:
    """The run as its record has it; its state is read when it is first needed."""
    if (snapshot := record.snapshot) is None:
        return HeldRun(record, revision, Backlog())
    backlog: Backlog[Delivery[AnyOperation]] = Backlog(next_seq=snapshot.seq + 1, read_up_to=snapshot.stream_seq)
    return HeldRun(record, revision, backlog, level=Level.STORE, size=snapshot.state.size)
