"""Wiring of the GPU exporter.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| readings | the driver; bucket `replicas`, for the names of processes | `read_seconds` | the clock |

It asks the driver in a thread: one that hangs holds up nothing, and what was read before stops being shown. Without a
GPU it looks again from time to time, since a driver may be loaded later.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence

import psutil

from services.gpu_exporter.config import GpuExporterConfig
from services.gpu_exporter.metrics import GpuMetrics, Shown
from services.gpu_exporter.readings import Driver, Reading, by_replica, read
from shared import topology
from shared.errors import MeshError
from shared.metrics import OTHERS
from shared.node import Node

log = logging.getLogger(__name__)

NONE_SECONDS = 30.0
"""Time between two looks for a GPU where there was none."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class GpuExporterService:
    """The exporter of one machine."""

    base_model: str | None = None
    offers: Sequence[str] = ()

    def __init__(self, config: GpuExporterConfig, node: Node, open_driver: Callable[[], Driver | None]) -> None:
        self._config = config
        self._node = node
        self._open = open_driver
        self._driver: Driver | None = None
        self._count = 0
        self._metrics = GpuMetrics(node.telemetry.registry, config.hostname or socket.gethostname())

    def activity(self) -> str:
        """See `Service.activity`."""
        return f"{self._count} GPUs" if self._count else "no GPU"

    async def start(self) -> None:
        """Read once, then go on."""
        self._driver = await asyncio.to_thread(self._open)
        self._node.tasks.start("readings", self._read_for_ever())

    async def stop(self) -> None:
        """Nothing is in work."""

    async def _read_for_ever(self) -> None:
        while True:
            if self._driver is None:
                await asyncio.sleep(NONE_SECONDS)
                self._driver = await asyncio.to_thread(self._open)
                continue
            try:
                await self._read(self._driver)
            except OSError as error:
                log.warning("the driver does not answer: %s", error)
                self._driver, self._count = None, 0
                continue
            await asyncio.sleep(self._config.read_seconds)

    async def _read(self, driver: Driver) -> None:
        readings = await asyncio.to_thread(read, driver)
        self._count = len(readings)
        replicas = await self._replicas() if any(reading.processes for reading in readings) else {}
        self._metrics.seen(await asyncio.to_thread(_shown, readings, replicas))

    async def _replicas(self) -> dict[int, str]:
        """Names by process id, of those that are surely on this machine; a process id says nothing elsewhere."""
        try:
            entries = await self._node.bus.table(topology.REPLICAS).items()
        except MeshError:
            return {}
        return {entry.value.pid: entry.value.replica for entry in entries if entry.value.host in LOOPBACK}


def _shown(readings: Sequence[Reading], replicas: dict[int, str]) -> list[Shown]:
    return [Shown(reading, by_replica(reading.processes, _parents, replicas, OTHERS)) for reading in readings]


def _parents(pid: int) -> list[int]:
    """A process and those that started it."""
    try:
        return [pid, *(each.pid for each in psutil.Process(pid).parents())]
    except psutil.Error:
        return [pid]
