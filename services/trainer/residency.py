"""Which runs leave the device, and which leave memory. Pure: the time is passed in.

A run that nobody has used for a while is parked in host memory, and later written to the blob store and dropped; its
lease stays. Beyond that, runs leave when there are more than a limit, the least recently used first. A run with
waiting work leaves only if all others have left; one in the middle of an operation is never written out, since what
its parts gave is in no snapshot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """Where a run's state is."""

    NOWHERE = "nowhere"
    """It has not been created yet."""
    DEVICE = "device"
    HOST = "host"
    STORE = "store"
    """Only in its snapshot."""


@dataclass(frozen=True)
class Residence:
    """A run, as far as its place is concerned."""

    run: str
    level: Level
    used: float
    """When it last did something, in seconds."""
    size: int = 0
    """Bytes of its state."""
    waits: bool = False
    """Whether it has work to do."""
    begun: bool = False
    """Whether it is in the middle of an operation, or its files are being written or read."""


@dataclass(frozen=True)
class Limits:
    """What may stay where, and how long. Of bytes, 0 is no limit."""

    device_runs: int
    device_bytes: int
    host_runs: int
    park_seconds: float
    evict_seconds: float


def most_that_fit(runs: Sequence[Residence], limits: Limits) -> int:
    """How many of these runs, from the first on, may be on the device together: at least one."""
    size = 0
    for count, each in enumerate(runs):
        size += each.size
        if count and (count >= limits.device_runs or 0 < limits.device_bytes < size):
            return count
    return len(runs)


def to_park(
    runs: Iterable[Residence], limits: Limits, now: float, *, keep: Collection[str] = (), coming: Sequence[int] = ()
) -> list[str]:
    """Runs to move to host memory: all that are idle, and so many that there is room for those to come.

    `keep` stay in any case; `coming` has the bytes of each run that will be put on the device.
    """
    there = [each for each in runs if each.level is Level.DEVICE]
    count, size = len(there) + len(coming), sum(each.size for each in there) + sum(coming)
    chosen = []
    for each in by_use(there, keep):
        idle = not each.waits and now - each.used > limits.park_seconds
        if idle or count > limits.device_runs or 0 < limits.device_bytes < size:
            chosen.append(each.run)
            count, size = count - 1, size - each.size
    return chosen


def to_evict(runs: Iterable[Residence], limits: Limits, now: float, *, keep: Collection[str] = ()) -> list[str]:
    """Parked runs to write out and drop: all that are idle for long, and those beyond the limit of host memory."""
    parked = [each for each in runs if each.level is Level.HOST]
    count = len(parked)
    chosen = []
    for each in by_use((each for each in parked if not each.begun), keep):
        if count > limits.host_runs or (not each.waits and now - each.used > limits.evict_seconds):
            chosen.append(each.run)
            count -= 1
    return chosen


def by_use(runs: Iterable[Residence], keep: Collection[str]) -> list[Residence]:
    """Those that may go, the first to go first."""
    return sorted((each for each in runs if each.run not in keep), key=lambda each: (each.waits, each.used))
