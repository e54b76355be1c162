"""From the driver's answers to plain readings. Pure but for the driver, which is a protocol with a fake in tests/."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

T = TypeVar("T")

MIB = 1 << 20


class NotSupported(Exception):
    """The driver cannot say this of this GPU."""


@dataclass(frozen=True)
class Identity:
    """What does not change of a GPU."""

    uuid: str
    pci_bus_id: str
    model: str


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    total: int
    used: int
    free: int
    reserved: int
    """By the driver; neither used nor free."""


class Driver(Protocol):
    """What is asked of the driver, of a GPU by index. A question may raise `NotSupported`, or `OSError`: it is gone."""

    def count(self) -> int:
        """GPUs of this machine."""

    def identity(self, gpu: int) -> Identity:
        """See `Identity`."""

    def memory(self, gpu: int) -> Memory:
        """See `Memory`."""

    def utilisation(self, gpu: int) -> tuple[int, int]:
        """Per cent of the time in which a kernel ran, and in which memory was read or written."""

    def power(self, gpu: int) -> int:
        """Milliwatts."""

    def energy(self, gpu: int) -> int:
        """Millijoules since the driver was loaded."""

    def temperature(self, gpu: int) -> int:
        """Degrees Celsius."""

    def clock(self, gpu: int) -> int:
        """Of the multiprocessors, in MHz."""

    def processes(self, gpu: int) -> Mapping[int, int]:
        """Bytes that each process has there, by process id."""


@dataclass(frozen=True)
class Reading:
    """One GPU at one time."""

    gpu: int
    identity: Identity
    values: Mapping[str, float]
    """By DCGM's name, in DCGM's unit. What the driver cannot say is missing."""
    processes: Mapping[int, int] = field(default_factory=dict)


def read(driver: Driver) -> list[Reading]:
    """All GPUs. One that does not answer at all (it has fallen off the bus) is left out."""
    readings = []
    for gpu in range(driver.count()):
        try:
            identity = driver.identity(gpu)
        except (NotSupported, OSError):
            continue
        readings.append(Reading(gpu, identity, _values(driver, gpu), _asked(driver.processes, gpu) or {}))
    return readings


def _values(driver: Driver, gpu: int) -> dict[str, float]:
    found: dict[str, float | None] = {
        "DCGM_FI_DEV_POWER_USAGE": _asked(lambda gpu: driver.power(gpu) / 1000, gpu),
        "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": _asked(driver.energy, gpu),
        "DCGM_FI_DEV_GPU_TEMP": _asked(driver.temperature, gpu),
        "DCGM_FI_DEV_SM_CLOCK": _asked(driver.clock, gpu),
    }
    if (busy := _asked(driver.utilisation, gpu)) is not None:
        found |= {"DCGM_FI_DEV_GPU_UTIL": busy[0], "DCGM_FI_DEV_MEM_COPY_UTIL": busy[1]}
    if (memory := _asked(driver.memory, gpu)) is not None:
        found |= {
            "DCGM_FI_DEV_FB_USED": memory.used / MIB,
            "DCGM_FI_DEV_FB_FREE": memory.free / MIB,
            "DCGM_FI_DEV_FB_RESERVED": memory.reserved / MIB,
        }
    return {name: value for name, value in found.items() if value is not None}


def _asked(question: Callable[[int], T], gpu: int) -> T | None:
    try:
        return question(gpu)
    except (NotSupported, OSError):
        return None


def by_replica(
    processes: Mapping[int, int], parents: Callable[[int], Sequence[int]], replicas: Mapping[int, str], others: str
) -> dict[str, int]:
    """Bytes of each replica, by name, and of all `others` together.

    `parents` gives a process and those that started it, nearest first: an engine may compute in a child of its replica.
    """
    found: dict[str, int] = {}
    for pid, size in processes.items():
        name = next((replicas[each] for each in parents(pid) if each in replicas), others)
        found[name] = found.get(name, 0) + size
    return found
