"""A plan as `openrl plan` shows it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from services.autoscaler.config import GroupConfig
from services.autoscaler.observed import Load, Measured, Observed
from services.autoscaler.plan import Plan
from shared.contracts.placement import GpuRecord, GroupStanding, PlanRecord, ReplicaPlan


def told(plan: Plan, observed: Observed, groups: Sequence[GroupConfig], now: float, *, dry_run: bool) -> PlanRecord:
    """The plan with what it was made from."""
    drained = {drain.replica: drain.reason for drain in plan.drains}
    there = [
        ReplicaPlan(
            replica=replica.name,
            group=replica.group,
            gpus=list(replica.gpus),
            memory_gib=replica.shape.memory_gib,
            milli=replica.shape.milli,
            state="drain" if replica.name in drained else replica.state,
            reason=drained.get(replica.name, ""),
        )
        for replica in observed.replicas
    ]
    new = [
        ReplicaPlan(
            replica=start.replica,
            group=start.group,
            gpus=list(start.gpus),
            memory_gib=start.shape.memory_gib,
            milli=start.shape.milli,
            state="start",
            reason=start.reason,
        )
        for start in plan.starts
    ]
    return PlanRecord(
        at=now,
        groups=_standings(plan, observed, groups),
        replicas=[*there, *new],
        unmet=[unmet.reason for unmet in plan.unmet],
        gpus=[
            GpuRecord(name=gpu.name, index="", memory_gib=gpu.memory_gib, type=gpu.type) for gpu in observed.gpus or ()
        ],
        gpus_used=plan.gpus_used,
        frozen=plan.frozen,
        dry_run=dry_run,
    )


def _standings(plan: Plan, observed: Observed, groups: Sequence[GroupConfig]) -> list[GroupStanding]:
    configs = {group.name: group for group in groups}
    return [
        GroupStanding(
            group=group.group,
            role=configs[group.group].role,
            base_model=configs[group.group].base_model,
            have=group.have,
            wanted=group.target.wanted,
            reason=group.reason,
            load=_numbers(observed.loads.get(group.group)),
        )
        for group in plan.groups
    ]


def _numbers(load: Load | None) -> dict[str, float]:
    if load is None:
        return {}
    found: dict[str, Measured | None] = vars(load)
    return {name: round(measured.value, 3) for name, measured in found.items() if measured is not None}
