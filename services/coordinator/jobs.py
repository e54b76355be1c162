"""The jobs that a coordinator drives: claimed by lease, so that several coordinators share them and one takes over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from services.coordinator.config import CoordinatorConfig
from services.coordinator.driver import JobDriver
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.policy import MOST_REST, retry_seconds
from services.coordinator.records import LostJob, Records
from shared import observe, topology
from shared.contracts.jobs import FINISHED, JobPhase, JobRecord
from shared.errors import MeshError, TemporaryError, failure_of
from shared.leases import Key, Leases
from shared.node import Node
from shared.tasks import cancelled

log = logging.getLogger(__name__)

CLAIM_SECONDS = 1.0
PHASES: tuple[JobPhase, ...] = ("queued", "running", "paused")
MOST_PUBLISHES = 64
"""Groups that are being published at the same time, for all jobs: leases and presence must get through beside them."""


class Jobs:
    """Follows the `jobs` bucket and drives what nobody else does. Nothing that one job does ends the others."""

    def __init__(self, node: Node, config: CoordinatorConfig, metrics: CoordinatorMetrics) -> None:
        self.drivers: dict[str, JobDriver] = {}
        self._node = node
        self._config = config
        self._metrics = metrics
        self._table = node.bus.table(topology.JOB_RECORDS)
        self._open: dict[str, JobRecord] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._publishing = asyncio.Semaphore(MOST_PUBLISHES)
        self._resting: dict[str, tuple[int, float]] = {}
        """Jobs whose driving failed by something that may pass: how often in a row, and until when they rest."""
        self._changed = asyncio.Event()
        self._looking: list[asyncio.Task[None]] = []
        self._leases = Leases(node.bus, node.replica, node.tasks, self._lost)
        for phase in PHASES:
            metrics.open.labels(phase).set_function(partial(self._count, phase))

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
            await self._release(name)

    async def _watch(self) -> None:
        async for change in self._table.changes():
            name, record = change.key[0], change.value
            if record is None or record.phase in FINISHED:
                self._open.pop(name, None)
                self._resting.pop(name, None)
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
                rests = record.wanted == "run" and time.monotonic() < self._resting.get(record.job, (0, 0.0))[1]
                if record.job in self.drivers or idle or full or rests:
                    continue
                try:
                    await self._claim(record.job)
                except MeshError as error:
                    log.warning("job %s could not be claimed: %s", record.job, error, extra={"job": record.job})
                except Exception as error:
                    log.exception("claiming job %s failed", record.job, extra={"job": record.job})
                    await self._release(record.job)
                    self._rest(record.job, time.monotonic(), error)

    async def _claim(self, name: str) -> None:
        if not await self._leases.claim(("job", name)):
            return
        entry = await self._leases.releasing_on_error(("job", name), self._table.get(name))
        if entry is None or entry.value.phase in FINISHED:
            await self._leases.release(("job", name))
            return
        metrics_dir = Path(self._config.metrics_dir)
        records = Records(self._node, entry.value, entry.revision, self._metrics, metrics_dir)
        driver = JobDriver(self._node, records, self._config, self._publishing)
        self.drivers[name] = driver
        self._metrics.running.set(len(self.drivers))
        self._running[name] = self._node.tasks.start(f"job {name}", self._drive(name, driver))

    async def _drive(self, name: str, driver: JobDriver) -> None:
        try:
            with observe.bound(job=name):
                await self._guarded(name, driver)
        finally:
            del self.drivers[name]
            self._running.pop(name, None)
            self._metrics.left(name)
            self._metrics.running.set(len(self.drivers))
            self._changed.set()
        await self._release(name)

    async def _guarded(self, name: str, driver: JobDriver) -> None:
        began = time.monotonic()
        error = await self._attempt(name, "driven", driver.run(), began)
        if error is None:
            return
        again = await self._attempt(name, "failed", driver.fail(failure_of(error).message), began)
        if again is not None:  # it stays open, and is tried again
            self._rest(name, began, again)

    async def _attempt(self, name: str, how: str, work: Coroutine[Any, Any, None], began: float) -> Exception | None:
        """Do something about a job. What it raises that neither is another's business nor may pass is returned."""
        try:
            await work
        except LostJob as error:
            log.warning("%s", error)
        except TemporaryError as error:
            self._rest(name, began, error)
        except Exception as error:  # nothing that one job does ends the others
            log.exception("job %s could not be %s", name, how)
            return error
        return None

    def _rest(self, name: str, began: float, error: Exception) -> None:
        now = time.monotonic()
        failures = self._resting.get(name, (0, 0.0))[0] + 1 if now - began < MOST_REST else 1
        seconds = retry_seconds(failures)
        self._resting[name] = failures, now + seconds
        log.warning("job %s rests for %g s: %s", name, seconds, error)

    async def _release(self, name: str) -> None:
        try:
            await self._leases.release(("job", name))
        except MeshError as error:
            log.warning("the lease of job %s was not released, and will expire: %s", name, error, extra={"job": name})

    def _count(self, phase: JobPhase) -> int:
        return sum(record.phase == phase for record in self._open.values())

    def _lost(self, key: Key) -> None:
        if (task := self._running.get(key[1])) is not None:
            task.cancel()
