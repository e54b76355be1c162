"""Looks at bus and blob store every few seconds, for the metrics: how full they are, and what waits.

The coordinator does it because it is always there. With no sampler and no trainer running, somebody must still say that
requests wait for one. What is open in a bucket is followed rather than read each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil

from services.coordinator.metrics import CoordinatorMetrics
from shared import topology
from shared.bus_load import measure
from shared.errors import TemporaryError
from shared.node import Node

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""As often as the metrics are scraped: a request that finds no replica is to be seen at once."""


class BusWatch:
    """Shows `metrics` what it sees."""

    def __init__(self, node: Node, metrics: CoordinatorMetrics) -> None:
        self._node = node
        self._metrics = metrics
        self._runs = node.bus.table(topology.RUNS)
        self._open: dict[str, str] = {}
        """Base model by run."""

    def start(self) -> None:
        """Begin."""
        self._node.tasks.start("open runs", self._follow_runs())
        self._node.tasks.start("bus", self._look_for_ever())

    async def _follow_runs(self) -> None:
        async for change in self._runs.changes():
            if change.value is None or change.value.closed:
                self._open.pop(change.key[0], None)
            else:
                self._open[change.key[0]] = change.value.base_model

    async def _look_for_ever(self) -> None:
        away = False
        while True:
            try:
                self._metrics.bus.seen(await measure(self._node.bus, self._open))
                away = False
            except TemporaryError as error:
                if not away:
                    log.warning("%s: what is said of it grows old", error)
                away = True
            await self._look_at_blobs()
            await asyncio.sleep(LOOK_SECONDS)

    async def _look_at_blobs(self) -> None:
        """How much room there is, where the blobs lie in a directory; a bucket has no size."""
        directory = self._node.blobs.path("")
        if directory is None:
            return
        with contextlib.suppress(OSError):
            usage = await asyncio.to_thread(shutil.disk_usage, directory)
            self._metrics.disk_free.labels("blobs").set(usage.free)
            self._metrics.disk_size.labels("blobs").set(usage.total)
