"""Whether services can work: what they say of themselves on the bus, and what /healthz answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType

import aiohttp

from services.local.processes import Child
from shared import topology
from shared.bus import Bus
from shared.contracts.replicas import ReplicaRecord
from shared.errors import MeshError

TIMEOUT_SECONDS = 2.0
HTTP_OK = 200


class Observer:
    """Looks at supervised services from outside."""

    def __init__(self, bus: Bus) -> None:
        """Use as an async context manager."""
        self._bus = bus
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS))

    async def __aenter__(self) -> Observer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        await self._http.close()

    async def look(self, children: Sequence[Child]) -> Mapping[str, ReplicaRecord] | None:
        """Tell each child what is seen of it, and return all replicas that are there, by name.

        While the bus is away nothing is seen, None is returned: services wait for it too.
        """
        if not self._bus.connected:
            return None
        try:
            records = await replicas(self._bus)
        except MeshError:
            return None
        await asyncio.gather(*(self._look_at(child, records) for child in children))
        return records

    async def _look_at(self, child: Child, records: Mapping[str, ReplicaRecord]) -> None:
        record = records.get(child.name)
        pid = child.pid
        if record is None or record.pid != pid:  # the entry of the process before it may still be there
            child.seen(pid, ready=False, port=None)
        else:
            child.seen(pid, ready=record.ready and await self._healthy(record), port=record.metrics_port)

    async def _healthy(self, record: ReplicaRecord) -> bool:
        try:
            async with self._http.get(f"http://{record.host}:{record.metrics_port}/healthz") as answer:
                return answer.status == HTTP_OK
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False


async def replicas(bus: Bus) -> dict[str, ReplicaRecord]:
    """The living replicas by name."""
    return {entry.value.replica: entry.value for entry in await bus.table(topology.REPLICAS).items()}
