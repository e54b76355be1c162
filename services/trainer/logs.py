"""Reads the logs of the runs held into their backlogs, in bounds, and sees to what cannot be read or never comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from services.trainer.backlog import Offered
from services.trainer.config import TrainerConfig
from services.trainer.held import HeldRun
from services.trainer.unreadable import seq_of
from shared import topology
from shared.bus import Bus, Delivery
from shared.contracts.training import AnyOperation
from shared.errors import MeshError, PermanentError, UserError
from shared.scans import Stored

log = logging.getLogger(__name__)

AHEAD_WHEN_STUCK = 16
"""How many times `max_backlog` is read ahead to find an operation that later ones have overtaken."""


class Logs:
    """The readers' work."""

    def __init__(
        self,
        bus: Bus,
        config: TrainerConfig,
        on_repeated: Callable[[Delivery[AnyOperation]], Awaitable[None]],
        refuse: Callable[[Delivery[AnyOperation], MeshError], None],
    ) -> None:
        """`on_repeated` answers what was executed before this trainer read it, `refuse` what will not be executed."""
        self.work = asyncio.Event()
        """Set when there may be something new to execute."""
        self._bus = bus
        self._config = config
        self._on_repeated = on_repeated
        self._refuse = refuse

    async def read(self, held: HeldRun) -> None:
        """Fill a run's backlog for ever."""

        async def unreadable(raw: Stored, error: PermanentError) -> None:
            self._pass_over(held, raw, error)

        after = held.backlog.read_up_to
        log_of_run = self._bus.follow(topology.OPERATIONS, after=after, on_unreadable=unreadable, run=held.name)
        async for delivery in log_of_run:
            await self._take_in(held, delivery)
            self.work.set()
            while len(held.backlog.waiting) >= self._most_waiting(held):
                held.room.clear()
                await held.room.wait()

    def give_up_missing(self, runs: Iterable[HeldRun]) -> None:
        """Fail the runs whose next operation has not come for too long, rather than wait for ever."""
        now = time.monotonic()
        for held in runs:
            if not held.backlog.is_stuck:
                continue
            seq = held.backlog.next_seq
            if held.stuck[0] != seq:
                held.stuck = (seq, now)
            full = len(held.backlog.waiting) >= self._most_waiting(held)
            if held.broken is None and (full or now - held.stuck[1] > self._config.missing_seconds):
                held.broken = _missing(held, now)
                log.error("%s", held.broken, extra={"run": held.name})
            if held.broken is not None:
                held.backlog.skip_missing()  # so that what waits is answered
                self.work.set()

    async def _take_in(self, held: HeldRun, delivery: Delivery[AnyOperation]) -> None:
        operation = delivery.message
        if operation.run != held.name:
            held.backlog.pass_over(delivery.seq)  # its seq is one of that run's
            self._refuse(delivery, UserError(f"it says that it is of run {operation.run!r}, not {held.name!r}"))
            return
        offered = held.backlog.offer(operation.seq, delivery, delivery.seq)
        if offered is Offered.WAITING:
            held.arrived[operation.seq] = time.monotonic()
        elif offered is Offered.HOLE:
            text = f"its seq {operation.seq} was used up by a message that could not be read: send it with a later one"
            self._refuse(delivery, UserError(text))
        elif offered is Offered.DONE_BEFORE and held.broken is not None:
            self._refuse(delivery, held.broken)
        elif offered is Offered.DONE_BEFORE:
            await self._on_repeated(delivery)

    def _pass_over(self, held: HeldRun, raw: Stored, error: PermanentError) -> None:
        """A message that cannot be read uses up its seq, as any failed operation does."""
        seq = seq_of(held.name, raw.msg_id, raw.body, raw.headers)
        log.error(
            "run %s: the message of operation %s cannot be read: %s", held.name, seq, error, extra={"run": held.name}
        )
        if seq is None:
            held.backlog.pass_over(raw.seq)
        else:
            held.backlog.offer(seq, None, raw.seq)
        self.work.set()

    def _most_waiting(self, held: HeldRun) -> int:
        """The rest waits in the log; unless the next seq is not there yet, then it must be looked for, further on."""
        return self._config.max_backlog * (AHEAD_WHEN_STUCK if held.backlog.is_stuck else 1)


def _missing(held: HeldRun, now: float) -> UserError:
    seq, since = held.stuck
    return UserError(
        f"run {held.name}: operation {seq} has not come in {now - since:.0f} s, though {len(held.backlog.waiting)} "
        "later ones have; it was never sent, or its message is lost. The run cannot go on: begin another one, from a "
        "checkpoint if there is one"
    )
