"""What the autoscaler sees: plain frozen data, taken at one time, without a clock.

A *group* is what is scaled together: the samplers of one base model (its pool), or the trainers of one. A replica
takes a share of one GPU (memory and milli-GPU of compute), a whole GPU, or several whole GPUs of one node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["starting", "ready", "draining"]
WHOLE = 1000
"""Milli-GPUs of a GPU."""


@dataclass(frozen=True)
class Measured:
    """A metric's value, and how many seconds ago it was true. A metric that nobody has is None instead."""

    value: float
    age: float = 0.0


@dataclass(frozen=True)
class Load:
    """What the metrics say of one group, summed over its replicas. None: the metric is missing."""

    queued: Measured | None = None
    """Samplers: sequences in the stream that no replica has taken. Trainers: operations likewise."""
    oldest: Measured | None = None
    """Seconds that the oldest of them has waited."""
    running: Measured | None = None
    """Sequences being generated."""
    waiting: Measured | None = None
    """Sequences that a replica has taken and that wait for a place."""
    finished: Measured | None = None
    """Sequences finished a second."""
    kv_cache: Measured | None = None
    """Share of the key-value caches in use, 0 to 1, averaged over the replicas."""
    tokens: Measured | None = None
    """Tokens computed a second."""
    backlog: Measured | None = None
    """Trainers: tokens that were read from runs' logs and wait for a pass."""
    duty: Measured | None = None
    """Trainers: share of the time in the engine, 0 to 1, averaged over the replicas."""


@dataclass(frozen=True)
class Shape:
    """What one replica needs."""

    memory_gib: float
    """Of each GPU."""
    milli: int = WHOLE
    """Thousandths of a GPU's compute; 1000: the GPU to itself."""
    gpus: int = 1
    """GPUs, all of one node. More than one are always whole ones: peers that wait for one another at every layer
    would be held up by whoever shares one of them."""
    types: frozenset[str] = frozenset()
    """Types of GPU that will do. Empty: any."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as the inventory has it."""

    name: str
    node: str
    memory_gib: float
    type: str = ""
    cordoned: bool = False
    """Nothing new goes there, and what is there moves away when there is room elsewhere. A lost GPU is not in the
    inventory at all."""


@dataclass(frozen=True)
class Replica:
    """A replica that was started and has not ended."""

    name: str
    group: str
    state: State
    gpus: tuple[str, ...]
    shape: Shape
    """As it was started; the group's shape may have changed since."""
    since: float = 0.0
    """When it was started."""
    replaces: str = ""
    """Replica that is drained as soon as this one is ready: how a replica moves without a gap."""
    pinned: bool = False
    """An operator wants it to stay as it is."""


@dataclass(frozen=True)
class Observed:
    """Everything at one time."""

    loads: Mapping[str, Load] = field(default_factory=dict)
    """By group. A group that is missing here has no metrics."""
    replicas: tuple[Replica, ...] = ()
    gpus: tuple[Gpu, ...] | None = ()
    """None: the inventory could not be read, so nothing is started, moved or stopped."""
