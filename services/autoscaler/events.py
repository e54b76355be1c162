"""What of a plan is said on EVENTS: what is done, and what is new. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from services.autoscaler.observed import Observed
from services.autoscaler.plan import GroupPlan, Plan
from shared.contracts.placement import ScalingDecided


def events(plan: Plan, before: Plan | None, observed: Observed, now: float, *, dry_run: bool) -> list[ScalingDecided]:
    """The events of a plan. A group's number, its being held and what is unmet are said when they change."""
    said = [*_of_groups(plan, before), *_of_starts(plan), *_of_drains(plan, observed), *_of_unmet(plan, before)]
    groups = {group.group: group for group in plan.groups}
    return [_with_numbers(event, groups.get(event.group), now, dry_run=dry_run) for event in said]


def _with_numbers(event: ScalingDecided, group: GroupPlan | None, now: float, *, dry_run: bool) -> ScalingDecided:
    wanted, have = (group.target.wanted, group.have) if group else (0, 0)
    return msgspec.structs.replace(event, wanted=wanted, have=have, at=now, dry_run=dry_run)


def _said(group: str, reason: str, cause: str) -> ScalingDecided:
    return ScalingDecided(group=group, decision="scale", reason=reason, cause=cause, wanted=0, have=0, at=0.0)


def _of_groups(plan: Plan, before: Plan | None) -> Iterator[ScalingDecided]:
    earlier = {group.group: group for group in before.groups} if before else {}
    for group in plan.groups:
        if _is_new(group, earlier.get(group.group)):
            event = _said(group.group, group.reason, group.target.why)
            yield msgspec.structs.replace(event, decision="hold" if group.target.why == "hold" else "scale")


def _is_new(group: GroupPlan, before: GroupPlan | None) -> bool:
    """Whether there is something to say: another number, or that metrics are gone, or back."""
    held = group.target.why == "hold"
    if before is None:
        return held or group.target.wanted != group.have
    return group.target.wanted != before.target.wanted or held != (before.target.why == "hold")


def _of_starts(plan: Plan) -> Iterator[ScalingDecided]:
    causes = {group.group: group.target.why for group in plan.groups}
    for start in plan.starts:
        event = _said(start.group, start.reason, "moved" if start.replaces else causes[start.group])
        yield msgspec.structs.replace(
            event, decision="start", replica=start.replica, gpus=list(start.gpus), replaces=start.replaces
        )


def _of_drains(plan: Plan, observed: Observed) -> Iterator[ScalingDecided]:
    where = {replica.name: replica.gpus for replica in observed.replicas}
    for drain in plan.drains:
        event = _said(drain.group, drain.reason, drain.cause)
        gpus = list(where.get(drain.replica, ()))
        yield msgspec.structs.replace(event, decision="drain", replica=drain.replica, gpus=gpus)


def _of_unmet(plan: Plan, before: Plan | None) -> Iterator[ScalingDecided]:
    said = {(each.group, each.soon) for each in before.unmet} if before else set()
    for unmet in plan.unmet:
        if (unmet.group, unmet.soon) not in said:
            said.add((unmet.group, unmet.soon))
            event = _said(unmet.group, unmet.reason, "waits" if unmet.soon else "no room")
            yield msgspec.structs.replace(event, decision="unmet")
