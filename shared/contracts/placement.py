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
