"""What is decided: plain data that an actuator carries out as it stands, and that people can read.

An actuator needs no judgement. It starts what `Start` names on the GPUs that it names, and drains what `Drain` names
and stops it when it is empty. Names are given here, the lowest number that is free in the group, so carrying out the
same plan twice starts nothing twice: the second time the name is taken. What has become of a plan is seen in the next
observation; nothing else is remembered of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from services.autoscaler.observed import Shape
from services.autoscaler.stability import GroupMemory, Target


@dataclass(frozen=True)
class Start:
    """Start a replica. There is room for it now."""

    replica: str
    group: str
    gpus: tuple[str, ...]
    shape: Shape
    reason: str
    replaces: str = ""
    """Replica that moves here: it is drained, by a later plan, when this one is ready."""


@dataclass(frozen=True)
class Drain:
    """Let a replica finish what it has, then stop it."""

    replica: str
    group: str
    reason: str
    cause: Literal["surplus", "moved", "preempted", "lost", "unknown"] = "surplus"


@dataclass(frozen=True)
class Unmet:
    """A replica that is wanted and not started."""

    group: str
    reason: str
    soon: bool = False
    """Room for it is being made; otherwise there is none to be had."""
    replaces: str = ""


@dataclass(frozen=True)
class GroupPlan:
    """What a group should have."""

    group: str
    have: int
    """Replicas that start or are ready, those on the move once."""
    target: Target
    reason: str
    changed: bool
    """Whether the number differs from that of the plan before."""


@dataclass(frozen=True)
class Plan:
    """Everything that follows from one observation."""

    groups: tuple[GroupPlan, ...] = ()
    starts: tuple[Start, ...] = ()
    drains: tuple[Drain, ...] = ()
    unmet: tuple[Unmet, ...] = ()
    gpus: int = 0
    """In the inventory."""
    gpus_used: int = 0
    """Of these, with a replica on them when the plan has been carried out."""
    frozen: str = ""
    """Why nothing at all is done, where that is so."""

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.starts or self.drains)


@dataclass(frozen=True)
class Memory:
    """What the policy remembers between two plans; it begins empty."""

    groups: Mapping[str, GroupMemory] = field(default_factory=dict)
