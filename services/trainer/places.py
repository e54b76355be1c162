"""Brings runs to the device before their operations, and makes room by moving others away.

`services.trainer.residency` decides; here it is done. Nothing here runs beside an operation of the same trainer: the
service holds its lock around both.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from services.trainer.config import TrainerConfig
from services.trainer.engine_thread import EngineThread
from services.trainer.engines.base import NoRoom
from services.trainer.held import HeldRun
from services.trainer.metrics import TrainerMetrics
from services.trainer.residency import Level, Limits, Residence, by_use, most_that_fit, to_evict, to_park
from services.trainer.snapshots import Snapshots
from shared.contracts.policies import LoraSpec
from shared.errors import MeshError, PermanentError, TemporaryError, UserError

log = logging.getLogger(__name__)

NEAREST = (Level.DEVICE, Level.NOWHERE, Level.HOST, Level.STORE)
NO_ROOM_SECONDS = 5.0
"""How long a run waits that does not fit although all others have left: another process has the memory."""


class Places:
    """Who is on the device, who in host memory, who in the blob store."""

    def __init__(
        self,
        config: TrainerConfig,
        engine: EngineThread,
        metrics: TrainerMetrics,
        held: Mapping[str, HeldRun],
        snapshots: Snapshots,
    ) -> None:
        self._limits = Limits(
            device_runs=config.max_resident_runs,
            device_bytes=config.max_resident_bytes,
            host_runs=config.max_host_runs,
            park_seconds=config.park_seconds,
            evict_seconds=config.evict_seconds,
        )
        self._engine = engine
        self._metrics = metrics
        self._held = held
        self._snapshots = snapshots

    async def bring(self, runs: Sequence[HeldRun]) -> list[HeldRun]:
        """Put runs on the device, as many as fit together, and return these. Those that are nearest come first.

        A run that cannot be brought back is marked: broken for good, or to be tried again later.
        """
        runs = sorted(runs, key=lambda held: NEAREST.index(held.level))  # else each turn would move them all
        runs = runs[: most_that_fit([_residence(held) for held in runs], self._limits)]
        await self._leave_room({held.name for held in runs}, [held.size for held in runs if _is_away(held)])
        ready: list[HeldRun] = []
        for held in runs:
            try:
                await self._bring(held, {each.name for each in ready})
            except NoRoom as error:
                if ready:
                    break  # these first, the others after them
                _try_later(held, TemporaryError(str(error), delay=NO_ROOM_SECONDS))
            except PermanentError as error:
                log.error("run %s cannot be brought back: %s", held.name, error, extra={"run": held.name})
                held.broken = error
            except TemporaryError as error:
                _try_later(held, error)
            else:
                ready.append(held)
        return ready

    async def create(self, held: HeldRun, lora: LoraSpec) -> None:
        """Begin a run on the device. Raise `NoRoom` if it does not fit though all others have left."""
        await self._leave_room({held.name}, [0])
        await self._in_room(held, lambda: self._engine.engine.create_run(held.name, lora), {held.name})
        await self._arrived(held)

    async def replaced(self, held: HeldRun) -> None:
        """The newest snapshot is not of what is in memory, but of what the run is from now on."""
        assert held.record.snapshot is not None, f"run {held.name} has no snapshot"
        await self._engine.call(self._engine.engine.drop_run, held.name)
        held.level, held.size = Level.STORE, held.record.snapshot.state.size

    async def make_room(self, held: HeldRun) -> bool:
        """Move one run away for another, or bring that one back if it has left itself. False: none is left."""
        if not _is_away(held):
            return await self._park_one({held.name})
        try:
            await self._bring(held, set())
        except MeshError:
            return False
        return True

    async def tidy(self) -> bool:
        """Park what is idle, and write out one run that has to go. False: nothing more is to be done now."""
        now = time.monotonic()
        for name in to_park(self._residences(), self._limits, now):
            await self._park(name)
        evicted = to_evict(self._residences(), self._limits, now)
        return bool(evicted) and await self._evict(evicted[0])

    async def _leave_room(self, keep: Collection[str], coming: Sequence[int]) -> None:
        now = time.monotonic()
        for name in to_park(self._residences(), self._limits, now, keep=keep, coming=coming):
            await self._park(name)
        for name in to_evict(self._residences(), self._limits, now, keep=keep):
            await self._evict(name)

    async def _bring(self, held: HeldRun, keep: set[str]) -> None:
        if held.level is Level.HOST:
            await self._in_room(held, lambda: self._engine.engine.bring_back(held.name), {*keep, held.name})
        elif held.level is Level.STORE:
            state = await self._snapshots.read(held)
            await self._in_room(held, lambda: self._engine.engine.restore(held.name, state), {*keep, held.name})
        if _is_away(held):
            self._metrics.loads.labels(held.level.value).inc()
            await self._arrived(held)
        held.used_at = time.monotonic()

    async def _in_room(self, held: HeldRun, place: Callable[[], None], keep: Collection[str]) -> None:
        """Put a run on the device; where memory runs out, after the least recently used run has left."""
        while True:
            if self._held.get(held.name) is not held:
                # The engine has dropped it, or will after what is asked of it now: nothing must be left behind.
                raise _gone(held)
            try:
                return await self._engine.call(place)
            except NoRoom:
                if not await self._park_one(keep):
                    raise

    async def _arrived(self, held: HeldRun) -> None:
        held.level, held.used_at = Level.DEVICE, time.monotonic()
        try:
            held.size = await self._engine.call(self._engine.engine.size_of, held.name)
        except UserError:
            raise _gone(held) from None

    async def _park_one(self, keep: Collection[str]) -> bool:
        there = by_use((each for each in self._residences() if each.level is Level.DEVICE), keep)
        if there:
            await self._park(there[0].run)
        return bool(there)

    async def _park(self, name: str) -> None:
        await self._engine.call(self._engine.engine.park, name)
        if (held := self._held.get(name)) is not None:  # its lease may have gone meanwhile
            held.level = Level.HOST

    async def _evict(self, name: str) -> bool:
        held = self._held.get(name)
        if held is None:
            return False
        if self._snapshots.is_needed(held) and not await self._snapshots.write(held):
            return False  # it stays; what was done to it is nowhere else
        await self._engine.call(self._engine.engine.drop_run, name)
        held.level = Level.STORE
        return True

    def _residences(self) -> list[Residence]:
        return [_residence(held) for held in self._held.values()]


def _residence(held: HeldRun) -> Residence:
    return Residence(
        run=held.name,
        level=held.level,
        used=held.used_at,
        size=held.size,
        waits=held.backlog.head is not None,
        begun=held.data_done > 0 or held.aside is not None,
    )


def _is_away(held: HeldRun) -> bool:
    return held.level in (Level.HOST, Level.STORE)


def _gone(held: HeldRun) -> TemporaryError:
    return TemporaryError(f"run {held.name} is no longer ours")


def _try_later(held: HeldRun, error: TemporaryError) -> None:
    held.not_before = time.monotonic() + error.delay
    log.warning("run %s waits: %s", held.name, error, extra={"run": held.name})
