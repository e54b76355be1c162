"""What replicas have used for their owners: counted in memory, told on the bus every few seconds.

A record covers one UTC hour at most, so that a bill by the hour is a sum of records. A replica that is killed takes
what it has not told with it: its owners pay too little rather than too much.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable

import msgspec

from shared import topology
from shared.bus import Bus
from shared.contracts.tenants import UsageKind, UsageRecorded
from shared.errors import MeshError, PermanentError
from shared.tasks import Tasks

log = logging.getLogger(__name__)

TELL_SECONDS = 10.0
STOP_SECONDS = 2.0
"""How long a replica that stops waits for a bus that is away."""
HOUR = 3600.0

_Key = tuple[str, str, str, UsageKind, bool, int]
"""Owner, session, base model, kind, whether cached, hour since the epoch."""


class Usage:
    """The tokens that one replica has processed."""

    def __init__(self, bus: Bus, base_model: str, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since the epoch."""
        self._bus = bus
        self._base_model = base_model
        self._clock = clock
        self._counted: dict[_Key, UsageRecorded] = {}
        self._untold: dict[str, UsageRecorded] = {}
        """By message id: the bus may have stored some of them, so they are sent again as they are."""

    def count(self, kind: UsageKind, tokens: int, *, owner: str, session: str, cached: bool = False) -> None:
        """Tokens were processed now."""
        if not tokens:
            return
        now = self._clock()
        key = (owner, session, self._base_model, kind, cached, int(now // HOUR))
        before = self._counted.get(key)
        self._counted[key] = UsageRecorded(
            owner=owner,
            kind=kind,
            tokens=tokens + (before.tokens if before else 0),
            begin=before.begin if before else now,
            end=now,
            base_model=self._base_model,
            session=session,
            cached=cached,
        )

    def start(self, tasks: Tasks) -> None:
        """Begin to tell."""
        tasks.start("usage", self._tell_for_ever())

    async def stop(self) -> None:
        """Tell what is left, if the bus is there."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self.tell()

    async def tell(self) -> None:
        """Publish what was counted. What cannot be published now is kept for the next time."""
        counted, self._counted = self._counted, {}
        self._untold |= {f"usage/{uuid.uuid4().hex}": record for record in counted.values()}
        for msg_id, record in list(self._untold.items()):
            try:
                await self._bus.publish(topology.USED, record, msg_id=msg_id, owner=record.owner)
            except PermanentError as error:
                log.error("usage %s is lost: %s", msgspec.to_builtins(record), error)
            del self._untold[msg_id]

    async def _tell_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            try:
                await self.tell()
            except MeshError as error:
                log.warning("usage is told later: %s", error)
