"""The driver through NVML, NVIDIA's management library: nothing here but the calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

from services.gpu_exporter.readings import Driver, Identity, Memory, NotSupported

T = TypeVar("T")
log = logging.getLogger(__name__)


def open_driver() -> Driver | None:
    """The driver of this machine; None: there is none, or no GPU."""
    try:
        pynvml.nvmlInit()
        return Nvml() if pynvml.nvmlDeviceGetCount() else None
    except pynvml.NVMLError as error:
        log.info("no GPU is seen: %s", error)
        return None


class Nvml:
    """See `Driver`."""

    def count(self) -> int:
        """See `Driver.count`."""
        return int(_asked(pynvml.nvmlDeviceGetCount))

    def identity(self, gpu: int) -> Identity:
        """See `Driver.identity`."""
        handle = _handle(gpu)
        return Identity(
            uuid=_text(_asked(pynvml.nvmlDeviceGetUUID, handle)),
            pci_bus_id=_text(_asked(pynvml.nvmlDeviceGetPciInfo, handle).busId),
            model=_text(_asked(pynvml.nvmlDeviceGetName, handle)),
        )

    def memory(self, gpu: int) -> Memory:
        """See `Driver.memory`."""
        found = _asked(pynvml.nvmlDeviceGetMemoryInfo, _handle(gpu), pynvml.nvmlMemory_v2)
        return Memory(total=found.total, used=found.used, free=found.free, reserved=found.reserved)

    def utilisation(self, gpu: int) -> tuple[int, int]:
        """See `Driver.utilisation`."""
        found = _asked(pynvml.nvmlDeviceGetUtilizationRates, _handle(gpu))
        return int(found.gpu), int(found.memory)

    def power(self, gpu: int) -> int:
        """See `Driver.power`."""
        return int(_asked(pynvml.nvmlDeviceGetPowerUsage, _handle(gpu)))

    def energy(self, gpu: int) -> int:
        """See `Driver.energy`."""
        return int(_asked(pynvml.nvmlDeviceGetTotalEnergyConsumption, _handle(gpu)))

    def temperature(self, gpu: int) -> int:
        """See `Driver.temperature`."""
        return int(_asked(pynvml.nvmlDeviceGetTemperature, _handle(gpu), pynvml.NVML_TEMPERATURE_GPU))

    def clock(self, gpu: int) -> int:
        """See `Driver.clock`."""
        return int(_asked(pynvml.nvmlDeviceGetClockInfo, _handle(gpu), pynvml.NVML_CLOCK_SM))

    def processes(self, gpu: int) -> dict[int, int]:
        """See `Driver.processes`. A process whose memory is not told, as in some containers, has 0."""
        found = _asked(pynvml.nvmlDeviceGetComputeRunningProcesses, _handle(gpu))
        return {int(each.pid): int(each.usedGpuMemory or 0) for each in found}


def _handle(gpu: int) -> Any:
    return _asked(pynvml.nvmlDeviceGetHandleByIndex, gpu)


def _asked(function: Callable[..., T], *arguments: Any) -> T:
    try:
        return function(*arguments)
    except pynvml.NVMLError_NotSupported as error:
        raise NotSupported(str(error)) from None
    except pynvml.NVMLError as error:
        raise OSError(str(error)) from None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
