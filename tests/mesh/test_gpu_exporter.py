"""The GPU exporter as a service: with GPUs that are made up, and on a machine without any."""

from __future__ import annotations

import os
from typing import Any

import aiohttp

from services.gpu_exporter.config import GpuExporterConfig
from services.gpu_exporter.readings import Driver
from services.gpu_exporter.service import GpuExporterService
from shared import topology
from shared.bus import Bus
from shared.process import running
from tests.mesh.harness import Place, eventually
from tests.unit.test_gpu_exporter import FakeDriver


class Here(FakeDriver):
    """This very process computes on the first GPU."""

    def processes(self, gpu: int) -> dict[int, int]:
        return {os.getpid(): 1234} if gpu == 0 else {}


async def exported(bus: Bus, replica: str) -> str:
    entry = await bus.table(topology.REPLICAS).get(replica)
    assert entry is not None
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"http://127.0.0.1:{entry.value.metrics_port}/metrics") as answer,
    ):
        return await answer.text()


def exporter(place: Place, driver: Driver | None) -> Any:
    config = GpuExporterConfig(**place.common, replica="gpus-1", read_seconds=0.05, hostname="here")
    return running("gpu_exporter", config, lambda c, n: GpuExporterService(c, n, lambda: driver))


async def test_the_memory_of_a_process_bears_the_name_of_its_replica(place: Place, bus: Bus) -> None:
    async with exporter(place, Here()) as (service, _):

        async def named() -> str | None:
            text = await exported(bus, "gpus-1")
            return text if 'replica="gpus-1"} 1234.0' in text else None

        text = await eventually(named)
        assert service.activity() == "2 GPUs"
    assert 'modelName="NVIDIA H100"' in text


async def test_without_a_gpu_nothing_is_exported_and_nothing_fails(place: Place, bus: Bus) -> None:
    async with exporter(place, None) as (service, _):
        text = await exported(bus, "gpus-1")
        assert service.activity() == "no GPU"
    assert "DCGM" not in text
    assert "process_cpu_seconds_total" in text
