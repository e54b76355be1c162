"""An exporter of what a machine without GPUs cannot measure, and what services that are not here would say."""

from __future__ import annotations

import math
import time

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.aiohttp import make_aiohttp_handler

from services.gpu_exporter.metrics import GpuMetrics, Shown
from services.gpu_exporter.readings import read
from tests.declared_metrics import AGREED
from tests.unit.test_gpu_exporter import FakeDriver

VALUES = {"group": ("samplers", "trainers"), "replica": ("sampler-1", "trainer-1"), "decision": ("start", "drain")}
KINDS = {"gauge": Gauge, "counter": Counter}


class Changing(FakeDriver):
    """Its load changes with time, and its memory is held by somebody."""

    def utilisation(self, gpu: int) -> tuple[int, int]:
        return (int(50 + 40 * math.sin(time.monotonic() / 3 + gpu)), 30)

    def energy(self, gpu: int) -> int:
        return int(time.monotonic() * 300_000)


class FakeExporter:
    """GPUs by our own exporter's code; what is agreed of others with made-up values."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gpus = GpuMetrics(self.registry, "gpu-node")
        self._metrics = []
        for agreed in AGREED.values():
            for name, (kind, labels, what) in agreed.items():
                make = KINDS.get(kind, Histogram)
                self._metrics.append((make(name, what, labels, registry=self.registry), labels))

    def move(self) -> None:
        """Let all values go on."""
        self._gpus.seen([Shown(reading, {"sampler-1": 3 << 30}) for reading in read(Changing())])
        for metric, labels in self._metrics:
            for index in range(2 if labels else 1):
                values = [VALUES.get(label, (f"{label}-0", f"{label}-1"))[index] for label in labels]
                one = metric.labels(*values) if labels else metric
                if isinstance(one, Histogram):
                    one.observe(0.2)
                else:
                    one.inc(index + 1)

    async def serve(self) -> tuple[web.AppRunner, int]:
        """Listen on a free port of the loopback."""

        async def metrics(request: web.Request) -> web.StreamResponse:
            self.move()
            answer: web.StreamResponse = await make_aiohttp_handler(self.registry)(request)
            return answer

        app = web.Application()
        app.router.add_get("/metrics", metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, int(runner.addresses[0][1])
