"""What is exported of GPUs: DCGM exporter's metrics, so that rules and dashboards need not care who measures.

Not here, since NVML does not tell them: DCGM_FI_DEV_XID_ERRORS, and the DCGM_FI_PROF_* group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from services.gpu_exporter.readings import Reading

STALE_SECONDS = 15.0
"""An older reading is not shown: a driver that hangs answers nothing."""
LABELS = ("gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname")
NAMES = {
    "DCGM_FI_DEV_GPU_UTIL": "Share of the time in which a kernel ran (%)",
    "DCGM_FI_DEV_MEM_COPY_UTIL": "Share of the time in which memory was read or written (%)",
    "DCGM_FI_DEV_FB_USED": "Memory in use (MiB)",
    "DCGM_FI_DEV_FB_FREE": "Memory that is free (MiB)",
    "DCGM_FI_DEV_FB_RESERVED": "Memory that the driver keeps for itself (MiB)",
    "DCGM_FI_DEV_POWER_USAGE": "Power (W)",
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": "Energy since the driver was loaded (mJ)",
    "DCGM_FI_DEV_GPU_TEMP": "Temperature (C)",
    "DCGM_FI_DEV_SM_CLOCK": "Clock of the multiprocessors (MHz)",
}
"""All are gauges here. DCGM calls the energy a counter, but our client would add `_total` to a counter's name."""
PROCESS_MEMORY = "openrl_gpu_process_memory_bytes"


@dataclass(frozen=True)
class Shown:
    """A reading, and who has memory there."""

    reading: Reading
    replicas: dict[str, int]
    """Bytes by replica."""


class GpuMetrics:
    """Shows the last reading of all GPUs while it is fresh."""

    def __init__(self, registry: CollectorRegistry, hostname: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._hostname, self._clock = hostname, clock
        self._shown: Sequence[Shown] = ()
        self._at = 0.0
        registry.register(self)

    def seen(self, shown: Sequence[Shown]) -> None:
        """Take in a reading."""
        self._shown, self._at = shown, self._clock()

    def describe(self) -> Iterable[Metric]:
        """See prometheus_client."""
        return self._families(())

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client. Without a GPU, nothing."""
        fresh = self._clock() - self._at <= STALE_SECONDS
        return self._families(self._shown) if self._shown and fresh else ()

    def _families(self, shown: Sequence[Shown]) -> Iterator[Metric]:
        for name, what in NAMES.items():
            family = GaugeMetricFamily(name, what, labels=LABELS)
            for each in shown:
                if name in each.reading.values:
                    family.add_metric(self._labels(each.reading), each.reading.values[name])
            yield family
        memory = GaugeMetricFamily(
            PROCESS_MEMORY, "GPU memory of a replica", labels=("gpu", "UUID", "Hostname", "replica")
        )
        for each in shown:
            of = [str(each.reading.gpu), each.reading.identity.uuid, self._hostname]
            for replica, size in each.replicas.items():
                memory.add_metric([*of, replica], size)
        yield memory

    def _labels(self, reading: Reading) -> list[str]:
        who = reading.identity
        return [str(reading.gpu), who.uuid, who.pci_bus_id, f"nvidia{reading.gpu}", who.model, self._hostname]
