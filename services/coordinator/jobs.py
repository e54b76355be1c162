"""The jobs that a coordinator drives: claimed by lease, so that several coordinators share them and one takes over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from services.coordinator.config import CoordinatorConfig
from services.coordinator.driver import JobDriver
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.records import LostJob, Records
from shared import observe, topology
from shared.contracts.jobs import FINISHED, JobRecord
from shared.errors import MeshError
from shared.leases import Key, Leases
from shared.node import Node
from shared.tasks import cancelled

log = logging.getLogger(__name__)

CLAIM_SECONDS = 1.0


class Jobs:
    """Follows the `jobs` bucket and drives what nobody else does."""

    def __init__(self, node: Node, config: CoordinatorConfig, metrics: CoordinatorMetrics) -> None:
        self.drivers: dict[str, JobDriver] = {}
        self._node = node
        self._config = config
        self._metrics = metrics
        self._table = node.bus.table(topology.JOB_RECORDS)
        self._open: dict[str, JobRecord] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._looking: list[asyncio.Task[None]] = []
        self._leases = Leases(node.bus, node.replica, node.tasks, self._lost)

    def start(self) -> None:
        """Begin to look for jobs."""
        self._leases.start()
        self._looking = [
            self._node.tasks.start("jobs", self._watch()),
            self._node.tasks.start("claims", self._claim_for_ever()),
        ]

    async def stop(self) -> None:
        """Let go of all jobs, their records say where they stand, and claim nothing more."""
        await cancelled(self._looking)
        for name, task in list(self._running.items()):
            await cancelled([task])
            await self._leases.release(("job", name))

    async def _watch(self) -> None:
        async for change in self._table.changes():
            name, record = change.key[0], change.value
            if record is None or record.phase in FINISHED:
                self._open.pop(name, None)
                continue
            before = self._open.get(name)
            self._open[name] = record
            if name in self.drivers and record.wanted != "run" and (before is None or before.wanted != record.wanted):
                self.drivers[name].wish(record.wanted)
            elif name not in self.drivers:
                self._changed.set()

    async def _claim_for_ever(self) -> None:
        while True:
            # Again every second: the lease of a killed coordinator expires without a word.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLAIM_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            for record in sorted(self._open.values(), key=lambda record: (-record.spec.priority, record.created)):
                idle = record.phase == "paused" and record.wanted == "pause"
                full = len(self.drivers) >= self._config.max_jobs and record.wanted == "run"
                if record.job in self.drivers or idle or full:
                    continue
                try:
                    await self._claim(record.job)
                except MeshError as error:
                    log.warning("job %s could not be claimed: %s", record.job, error)

    async def _claim(self, name: str) -> None:
        if not await self._leases.claim(("job", name)):
            return
        entry = await self._leases.releasing_on_error(("job", name), self._table.get(name))
        if entry is None or entry.value.phase in FINISHED:
            await self._leases.release(("job", name))
            return
        metrics_dir = Path(self._config.metrics_dir)
        records = Records(self._node, entry.value, entry.revision, self._metrics, metrics_dir)
        driver = JobDriver(
            self._node,
            records,
            max_failed_groups=self._config.max_failed_groups,
            keep_policies=self._config.keep_policies,
            patience_s=self._config.group_patience_s,
        )
        self.drivers[name] = driver
        self._metrics.running.set(len(self.drivers))
        self._running[name] = self._node.tasks.start(f"job {name}", self._drive(name, driver))

    async def _drive(self, name: str, driver: JobDriver) -> None:
        try:
            with observe.bound(job=name):
                await driver.run()
        except LostJob as error:
            log.warning("%s", error)
        finally:
            del self.drivers[name]
            self._running.pop(name, None)
            self._metrics.running.set(len(self.drivers))
            self._changed.set()
        await self._leases.release(("job", name))

    def _lost(self, key: Key) -> None:
        if (task := self._running.get(key[1])) is not None:
            task.cancel()
