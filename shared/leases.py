"""Leases: at most one replica works on a run or a job at a time.

A lease is an entry in the `leases` bucket that goes away by itself unless its holder renews it. Renewal is a
compare-and-set on its revision, so a holder that slept too long finds out that somebody else has taken over, and stops.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shared import topology
from shared.bus import Bus
from shared.contracts.training import Lease
from shared.errors import MeshError
from shared.tasks import Tasks

log = logging.getLogger(__name__)

T = TypeVar("T")

Key = tuple[str, str]
"""What is leased: its kind (`run`, `job`) and its name."""


class Leases:
    """The leases that one replica holds."""

    def __init__(self, bus: Bus, replica: str, tasks: Tasks, on_lost: Callable[[Key], None]) -> None:
        """`on_lost` is called when a lease has gone to somebody else; its work must stop at once."""
        self._table = bus.table(topology.LEASES)
        self._replica = replica
        self._tasks = tasks
        self._on_lost = on_lost
        self._revisions: dict[Key, int] = {}
        self._ttl = topology.LEASES.ttl

    @property
    def held(self) -> frozenset[Key]:
        """What this replica may work on."""
        return frozenset(self._revisions)

    def start(self) -> None:
        """Begin to renew."""
        self._tasks.start("leases", self._keep())

    async def claim(self, key: Key) -> bool:
        """Take a lease, or keep one that is held. False: somebody else has it."""
        if key in self._revisions:
            return True
        revision = await self._table.create(key, Lease(holder=self._replica))
        if revision is None:
            return False
        self._revisions[key] = revision
        return True

    async def releasing_on_error(self, key: Key, work: Awaitable[T]) -> T:
        """Do the first work under a lease; if it fails, give the lease up rather than hold it idly."""
        try:
            return await work
        except BaseException:
            await self.release(key)
            raise

    async def release(self, key: Key) -> None:
        """Give a lease up, so that somebody else can have it at once."""
        if self._revisions.pop(key, None) is not None:
            await self._table.delete(key)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._ttl / 4)
            for key in list(self._revisions):
                await self._renew(key)

    async def _renew(self, key: Key) -> None:
        held = self._revisions.get(key)
        if held is None:
            return
        try:
            revision = await self._table.update(key, Lease(holder=self._replica), held)
            if revision is None:
                revision = await self._regain(key)
            if key not in self._revisions:  # released meanwhile
                if revision is not None:
                    await self._table.delete(key)
                return
        except MeshError as error:
            log.warning("lease %s could not be renewed: %s", "/".join(key), error, extra={key[0]: key[1]})
            return
        if revision is None:
            del self._revisions[key]
            log.error("lease %s was lost", "/".join(key), extra={key[0]: key[1]})
            self._on_lost(key)
        else:
            self._revisions[key] = revision

    async def _regain(self, key: Key) -> int | None:
        """After a lost race: it may be our own write whose answer got lost, or an entry that expired unclaimed."""
        entry = await self._table.get(key)
        if entry is None:
            return await self._table.create(key, Lease(holder=self._replica))
        return entry.revision if entry.value.holder == self._replica else None
