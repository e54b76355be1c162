"""From work to a number of replicas that does not flutter. Pure.

Two windows decide, as in Knative's autoscaler: as a rule the average of a minute; when the average of a few seconds
wants so many times the replicas that are ready, that one (*panic*), which lasts until it has not been so for a minute,
and in which the number never falls. Down goes slower than up: a replica is given up when none of the last minutes
wanted it, with a margin. Zero comes only after a time without any work that was measured without a gap.

When metrics are missing, the number is *held*, and what was learnt of falling load is forgotten: patience begins anew
when they are back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf

from services.autoscaler.config import GroupConfig, ScalingConfig
from services.autoscaler.demand import Missing, Sample, Work, work


@dataclass(frozen=True)
class GroupMemory:
    """What is remembered of a group between two plans."""

    samples: tuple[Sample, ...] = ()
    """Of the stable window, oldest first."""
    wanted: int | None = None
    """Replicas, at the last plan. None: there was none."""
    changed: float = -inf
    """When that number last changed."""
    panic_until: float = -inf
    floors: tuple[tuple[float, int], ...] = ()
    """When, and to how many replicas one might have gone down: the largest of the last minutes counts. Only those
    that no later one reaches."""
    patient_since: float | None = None
    """Since when metrics have come without a gap."""
    idle_since: float | None = None
    """Since when there has been nothing to do."""


@dataclass(frozen=True)
class Target:
    """How many replicas a group should have, and what led to it."""

    wanted: int
    why: str
    """One of: panic, stable, patience, idle, wake, hold, minimum, maximum, zero."""
    work: Work | None = None
    unbounded: int = 0
    """What it would be without minimum and maximum."""
    missing: str = ""
    sample: Sample | None = None
    idle_for: float = 0.0


def target(
    found: Sample | Missing,
    have: int,
    ready: int,
    memory: GroupMemory,
    config: GroupConfig,
    scaling: ScalingConfig,
    now: float,
) -> tuple[Target, GroupMemory]:
    """Decide for one group. `have` counts replicas that start or are ready, `ready` the latter."""
    if isinstance(found, Missing):
        decided = _hold(found, have, memory, config)
        memory = replace(memory, samples=(), floors=(), patient_since=None, idle_since=None)
        return decided, _remember(memory, decided, now)
    memory = _with_sample(memory, found, scaling, now)
    stable = work(memory.samples, scaling.stable_seconds, config)
    panic = work(memory.samples, scaling.panic_seconds, config)
    memory = _with_panic(memory, panic, ready, config, scaling, now)
    memory = _with_floor(memory, stable, config, scaling, now)
    decided = _decide(found, stable, panic, have, memory, config, scaling, now)
    decided = _bounded(decided, config)
    return decided, _remember(memory, decided, now)


def _hold(found: Missing, have: int, memory: GroupMemory, config: GroupConfig) -> Target:
    wanted = have if memory.wanted is None else memory.wanted
    return Target(max(config.min, min(config.max, wanted)), "hold", unbounded=wanted, missing=found.why)


def _with_sample(memory: GroupMemory, found: Sample, scaling: ScalingConfig, now: float) -> GroupMemory:
    samples = memory.samples
    if not samples or found.at > samples[-1].at:
        samples = (*(one for one in samples if one.at > found.at - scaling.stable_seconds), found)
    idle_since = (found.at if memory.idle_since is None else memory.idle_since) if found.idle else None
    patient_since = now if memory.patient_since is None else memory.patient_since
    return replace(memory, samples=samples, idle_since=idle_since, patient_since=patient_since)


def _with_panic(
    memory: GroupMemory, panic: Work, ready: int, config: GroupConfig, scaling: ScalingConfig, now: float
) -> GroupMemory:
    jumps = ceil_(panic.replicas / config.target) >= scaling.panic_threshold * max(1, ready)
    return replace(memory, panic_until=now + scaling.stable_seconds) if jumps else memory


def _with_floor(
    memory: GroupMemory, stable: Work, config: GroupConfig, scaling: ScalingConfig, now: float
) -> GroupMemory:
    floor = ceil_(stable.replicas / (config.target * (1 - scaling.down_margin)))
    kept = tuple((at, number) for at, number in memory.floors if number > floor and at > now - scaling.down_seconds)
    return replace(memory, floors=(*kept, (now, floor)))


def _decide(
    found: Sample, stable: Work, panic: Work, have: int, memory: GroupMemory,
    config: GroupConfig, scaling: ScalingConfig, now: float,
) -> Target:  # fmt: skip
    """The number without bounds."""
    before = have if memory.wanted is None else memory.wanted
    if now < memory.panic_until:
        wanted = ceil_(panic.replicas / config.target)
        decided = Target(wanted, "panic", panic, sample=found)
    else:
        wanted = ceil_(stable.replicas / config.target)
        decided = Target(wanted, "stable", stable, sample=found)
    if wanted == 0 and not found.idle:
        decided = replace(decided, wanted=1, why="wake" if not before else decided.why)
    if decided.wanted < before:
        decided = _down(decided, before, memory, config, scaling, now)
    if before == 0 and decided.wanted > 0 and have == 0:
        decided = replace(decided, why="wake")
    return replace(decided, unbounded=decided.wanted)


def _down(
    decided: Target, before: int, memory: GroupMemory, config: GroupConfig, scaling: ScalingConfig, now: float
) -> Target:
    """Go down no faster than patience allows, and to zero only after the idle time."""
    patient = memory.patient_since is not None and now - memory.patient_since >= scaling.down_seconds
    if now < memory.panic_until or not patient:
        return replace(decided, wanted=before, why="patience" if now >= memory.panic_until else "panic")
    floor = min(before, max(number for _, number in memory.floors))
    if floor > 0:
        kept = max(floor, decided.wanted)
        return replace(decided, wanted=kept, why="patience" if kept > decided.wanted else decided.why)
    idle_for = now - memory.idle_since if memory.idle_since is not None else 0.0
    if idle_for >= config.idle_seconds:
        return replace(decided, wanted=0, why="zero", idle_for=idle_for)
    return replace(decided, wanted=1, why="idle", idle_for=idle_for)


def _bounded(decided: Target, config: GroupConfig) -> Target:
    if decided.wanted < config.min:
        return replace(decided, wanted=config.min, why="minimum")
    if decided.wanted > config.max:
        return replace(decided, wanted=config.max, why="maximum")
    return decided


def _remember(memory: GroupMemory, decided: Target, now: float) -> GroupMemory:
    changed = now if decided.wanted != memory.wanted else memory.changed
    return replace(memory, wanted=decided.wanted, changed=changed)


def ceil_(replicas: float) -> int:
    """Round up, but not for what rounding errors put above a whole number."""
    return ceil(replicas - 1e-9)
