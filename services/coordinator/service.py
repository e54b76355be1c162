"""Wiring of a coordinator.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| submit, cancel, pause, resume, delete | `rl.v1.jobs.*` | nothing | anyone's message |
| jobs | bucket `jobs` | a job that is open | a submission, an owner's wish |
| claims | open jobs that nobody drives | a lease | expiry of a killed coordinator's lease; the end of a job's rest |
| janitor | what clients' sessions have left | the janitor's lease; the end of its rest | the clock |
| a job | see `services.coordinator.driver` | | |
| bus | sizes of streams and queues, for the metrics; bucket `runs` | two seconds | the clock |
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.coordinator.bus_watch import BusWatch
from services.coordinator.config import CoordinatorConfig
from services.coordinator.deletion import Deletions
from services.coordinator.handlers import Controls, Submissions
from services.coordinator.janitor import Janitor
from services.coordinator.jobs import Jobs
from services.coordinator.metrics import CoordinatorMetrics
from shared import topology
from shared.node import Node
from shared.worker import Worker

CONCURRENT_COMMANDS = 8
SWEEP_SECONDS = 3600.0


class CoordinatorService:
    """One coordinator."""

    base_model: str | None = None
    offers: Sequence[str] = ()

    def __init__(self, config: CoordinatorConfig, node: Node) -> None:
        self._node = node
        metrics = CoordinatorMetrics(node.telemetry.registry)
        self._jobs = Jobs(node, config, metrics)
        self._bus_watch = BusWatch(node, metrics)
        self._janitor = Janitor(node, config, metrics)
        self._workers: list[Worker[Any]] = [
            self._worker(topology.SUBMIT, Submissions(node.bus, metrics)),
            self._worker(topology.CANCEL, Controls(node.bus, "cancel")),
            self._worker(topology.PAUSE, Controls(node.bus, "pause")),
            self._worker(topology.RESUME, Controls(node.bus, "run")),
            self._worker(topology.DELETE, Deletions(node.bus, node.blobs, Path(config.metrics_dir))),
        ]

    def activity(self) -> str:
        """See `Service.activity`."""
        return "; ".join(driver.activity for driver in self._jobs.drivers.values()) or "idle"

    async def start(self) -> None:
        """Take commands and drive jobs."""
        self._jobs.start()
        self._bus_watch.start()
        self._janitor.start()
        for worker in self._workers:
            self._node.tasks.start("commands", worker.run())
        self._node.tasks.start("sweep", self._sweep())

    async def stop(self) -> None:
        """Let go of all jobs; another coordinator, or this one after a restart, goes on."""
        await asyncio.gather(*(worker.stop(self._node.drain_seconds) for worker in self._workers))
        await self._jobs.stop()
        await self._janitor.stop()

    async def _sweep(self) -> None:
        """Delete bodies of messages that have aged out of their streams."""
        while True:
            await self._node.blobs.sweep(topology.BODIES, topology.BODIES_AGE)
            await asyncio.sleep(SWEEP_SECONDS)

    def _worker(self, channel: topology.Channel[Any], handler: Any) -> Worker[Any]:
        return Worker(
            self._node.bus,
            topology.job_consumer(channel),
            handler,
            concurrency=CONCURRENT_COMMANDS,
            metrics=self._node.worker_metrics,
        )
