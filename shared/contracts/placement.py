"""Decisions of the autoscaler, as others are told of them."""

from __future__ import annotations

from typing import Literal

from shared.contracts.base import Contract

Decision = Literal["scale", "hold", "start", "drain", "unmet"]


class ScalingDecided(Contract):
    """Something was decided about a group: the samplers, or the trainers, of one base model (event).

    `scale`: it should have another number of replicas. `hold`: the number stays, for want of metrics. `start`: a
    replica starts. `drain`: one finishes what it has and ends. `unmet`: one is wanted and cannot start.
    """

    group: str
    decision: Decision
    reason: str
    """For people, with the numbers."""
    wanted: int
    """Replicas that the group should have."""
    have: int
    """Replicas that start or are ready."""
    at: float
    """Seconds since 1970."""
    cause: str = ""
    """In a word: `panic`, `stable`, `wake`, `zero`; of a drain `surplus`, `moved`, `preempted`, `lost`, `unknown`."""
    replica: str = ""
    """The one that starts or drains."""
    gpus: list[str] = []
    """Where it starts, or was."""
    replaces: str = ""
    """The one that moves here."""
    dry_run: bool = False
    """Said, not done."""


class GpuRecord(Contract):
    """A GPU of a node."""

    name: str
    """`NODE/INDEX`."""
    index: str
    """As CUDA_VISIBLE_DEVICES takes it. Empty: the node's processor, shared out as if it were a GPU."""
    memory_gib: float
    type: str = ""


class NodeRecord(Contract):
    """A machine whose supervisor starts replicas that are placed there; its entry goes away by itself."""

    node: str
    gpus: list[GpuRecord]
    cordoned: bool = False


Role = Literal["sampler", "trainer"]


class PlacementRecord(Contract):
    """A replica that should run, and where; its node's supervisor sees to it, and removes the entry at its end."""

    replica: str
    group: str
    role: Role
    base_model: str
    gpus: list[str]
    memory_gib: float
    """Of each of these GPUs."""
    milli: int
    since: float
    """Seconds since 1970."""
    types: list[str] = []
    replaces: str = ""
    draining: bool = False
    """It is to finish what it has, and end."""
    pinned: bool = False


class ReplicaPlan(Contract):
    """A replica in a plan: where it is, and what becomes of it."""

    replica: str
    group: str
    gpus: list[str]
    memory_gib: float
    milli: int
    state: str
    """`starting`, `ready` or `draining` now; `start` or `drain`: what is decided."""
    reason: str = ""


class GroupStanding(Contract):
    """What a group has and should have."""

    group: str
    role: Role
    base_model: str
    have: int
    wanted: int
    reason: str
    load: dict[str, float] = {}
    """What was measured, by name."""


NEWEST_PLAN = "newest"
"""Key in the bucket `plans`."""


class PlanRecord(Contract):
    """A plan, for people; the bucket `plans` has the newest one."""

    at: float
    groups: list[GroupStanding] = []
    replicas: list[ReplicaPlan] = []
    """Those that are there, then those that are to start."""
    unmet: list[str] = []
    gpus: list[GpuRecord] = []
    gpus_used: int = 0
    frozen: str = ""
    dry_run: bool = False
