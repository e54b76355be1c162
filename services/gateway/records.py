"""Sessions, runs and samplers of the mesh, each only for its owner."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Generic, TypeVar

from services.gateway import ids
from services.gateway.auth import Caller
from services.gateway.errors import Gone, NotFound
from services.gateway.ids import shown
from shared import topology
from shared.bus import Bus
from shared.contracts.sessions import SamplerRecord, SessionRecord
from shared.contracts.training import RunRecord
from shared.tables import Table

T = TypeVar("T")

REMEMBERED = 20_000
SECONDS = 5.0
"""How old what is remembered may be: whether something is closed or over is known so late."""


class Remembered(Generic[T]):
    """The most recently used entries of a table."""

    def __init__(self, table: Table[T], seconds: float = SECONDS) -> None:
        self.table = table
        self._seconds = seconds
        self._values: OrderedDict[str, tuple[float, T]] = OrderedDict()

    async def get(self, key: str) -> T | None:
        """An entry, at most so many seconds old. Raise `TemporaryError` if the bus does not answer."""
        found = self._values.get(key)
        if found is not None and found[0] > time.monotonic():
            return found[1]
        entry = await self.table.get(key)
        if entry is None:
            self._values.pop(key, None)
            return None
        self.set(key, entry.value)
        return entry.value

    def set(self, key: str, value: T) -> None:
        """Remember what is known to be there."""
        self._values[key] = (time.monotonic() + self._seconds, value)
        self._values.move_to_end(key)
        if len(self._values) > REMEMBERED:
            self._values.popitem(last=False)

    def forget(self, key: str) -> None:
        """It has changed."""
        self._values.pop(key, None)


class Records:
    """What belongs to whom."""

    def __init__(self, bus: Bus) -> None:
        self.sessions = Remembered(bus.table(topology.SESSIONS))
        self.runs = Remembered(bus.table(topology.RUNS))
        self.samplers = Remembered(bus.table(topology.SAMPLERS), seconds=3600.0)

    async def session(self, caller: Caller, session: str) -> SessionRecord:
        """A session of the caller's. Raise `NotFound`."""
        record = await self.sessions.get(ids.check_session(session))
        if record is None or record.owner != caller.tenant:
            raise NotFound(f"there is no session {shown(session)}")
        return record

    async def open_session(self, caller: Caller, session: str) -> SessionRecord:
        """The same while it goes on. Raise `Gone` once it has ended."""
        record = await self.session(caller, session)
        if record.ended is not None:
            raise Gone(f"session {session} has ended ({record.ended}): begin a new one with a new ServiceClient")
        return record

    async def run(self, caller: Caller, run: str) -> RunRecord:
        """A run of the caller's. Raise `NotFound`."""
        ids.parse_run(run)
        record = await self.runs.get(run)
        if record is None or record.owner != caller.tenant:
            raise NotFound(f"there is no training run {shown(run)}")
        return record

    async def open_run(self, caller: Caller, run: str) -> RunRecord:
        """The same while it takes operations. Raise `Gone` once it is closed."""
        record = await self.run(caller, run)
        if record.closed:
            raise Gone(
                f"training run {run} is closed, since its session has ended: go on from one of its checkpoints with "
                "create_training_client_from_state_with_optimizer"
            )
        return record

    async def sampler(self, caller: Caller, sampler: str) -> SamplerRecord:
        """A sampler of the caller's. Raise `NotFound`."""
        ids.parse_sampler(sampler)
        record = await self.samplers.get(sampler)
        if record is None or record.owner != caller.tenant:
            raise NotFound(f"there is no sampling session {shown(sampler)}")
        return record
