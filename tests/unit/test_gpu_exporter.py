"""From what a driver says to DCGM's names and units, with a driver that is made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest

from services.gpu_exporter.metrics import NAMES, PROCESS_MEMORY, STALE_SECONDS, GpuMetrics, Shown
from services.gpu_exporter.readings import Identity, Memory, NotSupported, by_replica, read

T = TypeVar("T")
GIB = 1 << 30


class FakeDriver:
    """Two GPUs: the first one says everything, the second one only what it is and how full."""

    lost: frozenset[int] = frozenset()

    def count(self) -> int:
        return 2

    def identity(self, gpu: int) -> Identity:
        if gpu in self.lost:
            raise OSError("GPU is lost")
        return Identity(f"GPU-{gpu}", f"00000000:0{gpu}:00.0", "NVIDIA H100")

    def memory(self, gpu: int) -> Memory:
        return Memory(total=80 * GIB, used=10 * GIB, free=69 * GIB, reserved=GIB)

    def utilisation(self, gpu: int) -> tuple[int, int]:
        return self._only_first(gpu, (87, 40))

    def power(self, gpu: int) -> int:
        return self._only_first(gpu, 350_500)

    def energy(self, gpu: int) -> int:
        return self._only_first(gpu, 123_456)

    def temperature(self, gpu: int) -> int:
        return self._only_first(gpu, 61)

    def clock(self, gpu: int) -> int:
        return self._only_first(gpu, 1980)

    def processes(self, gpu: int) -> Mapping[int, int]:
        return self._only_first(gpu, {101: 4 * GIB, 202: 2 * GIB, 999: GIB})

    @staticmethod
    def _only_first(gpu: int, value: T) -> T:
        if gpu:
            raise NotSupported("Not Supported")
        return value


def test_values_have_the_names_and_units_of_dcgm() -> None:
    first, second = read(FakeDriver())
    assert first.values == {
        "DCGM_FI_DEV_GPU_UTIL": 87,
        "DCGM_FI_DEV_MEM_COPY_UTIL": 40,
        "DCGM_FI_DEV_FB_USED": 10 * 1024,
        "DCGM_FI_DEV_FB_FREE": 69 * 1024,
        "DCGM_FI_DEV_FB_RESERVED": 1024,
        "DCGM_FI_DEV_POWER_USAGE": 350.5,
        "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": 123_456,
        "DCGM_FI_DEV_GPU_TEMP": 61,
        "DCGM_FI_DEV_SM_CLOCK": 1980,
    }
    assert first.values.keys() == NAMES.keys()
    assert second.values.keys() == {"DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_FB_RESERVED"}
    assert second.processes == {}


def test_an_idle_gpu_has_a_utilisation_of_0_rather_than_none() -> None:
    class Idle(FakeDriver):
        def utilisation(self, gpu: int) -> tuple[int, int]:
            return (0, 0)

    assert read(Idle())[0].values["DCGM_FI_DEV_GPU_UTIL"] == 0


def test_a_lost_gpu_does_not_hide_the_others() -> None:
    driver = FakeDriver()
    driver.lost = frozenset({0})
    assert [reading.gpu for reading in read(driver)] == [1]


def test_memory_of_a_process_counts_for_the_replica_that_started_it() -> None:
    parents = {101: [101, 100, 1], 202: [202, 1], 999: [999]}
    found = by_replica({101: 4, 202: 2, 999: 1}, parents.__getitem__, {100: "sampler-a", 202: "trainer-a"}, "(others)")
    assert found == {"sampler-a": 4, "trainer-a": 2, "(others)": 1}


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_labels_are_those_of_dcgm_exporter_and_old_readings_are_not_shown() -> None:
    registry, clock = CollectorRegistry(), Clock()
    metrics = GpuMetrics(registry, "node-1", clock)
    assert generate_latest(registry) == b"", "no GPU, nothing exported"
    metrics.seen([Shown(reading, {"sampler-a": 5}) for reading in read(FakeDriver())])
    labels = {
        "gpu": "0",
        "UUID": "GPU-0",
        "pci_bus_id": "00000000:00:00.0",
        "device": "nvidia0",
        "modelName": "NVIDIA H100",
        "Hostname": "node-1",
    }
    assert registry.get_sample_value("DCGM_FI_DEV_GPU_UTIL", labels) == 87
    of = {"gpu": "1", "UUID": "GPU-1", "Hostname": "node-1", "replica": "sampler-a"}
    assert registry.get_sample_value(PROCESS_MEMORY, of) == 5
    assert "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{" in generate_latest(registry).decode()
    clock.now += STALE_SECONDS + 1
    assert generate_latest(registry) == b""
