"""What a job does next. Pure: decisions over plain data, without a clock, a bus or a random number.

Terms: `updates` counts optimizer updates, and is the version of the newest policy. A group's staleness, when it is
used, is `updates` minus the version that sampled it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from services.coordinator.advantages import scored
from shared.contracts.episodes import GroupScored, RewardSpec
from shared.contracts.jobs import EvaluationSpec, JobRecord, JobSpec, StepReport

MOST_REST = 60.0
"""Seconds."""


def version_of(group: GroupScored) -> int:
    """Version of the policy that sampled a group; the base model is version 0."""
    return group.policy.version if group.policy else 0


@dataclass(frozen=True)
class Standing:
    """How a job stands."""

    step: int
    """Steps that are done."""
    updates: int
    training: bool
    """Whether a step's operations are out."""
    outstanding: int
    """Groups that were asked for and are not used, whether or not they are back."""


def groups_to_ask_for(standing: Standing, spec: JobSpec) -> int:
    """How many more training groups to ask for now, of the newest policy.

    A group asked for now is used at the earliest after the groups that are outstanding; it is asked for if its policy
    will then not be too old, counting every step until then as an update.
    """
    size = spec.algorithm.groups_per_step
    begun = standing.step + standing.training
    left = (spec.algorithm.steps - begun) * size - standing.outstanding
    # Steps that will have begun before the last useful group: one more than may lie between policy and use.
    ahead = spec.algorithm.max_staleness + 1 - standing.training
    return max(0, min(left, ahead * size - standing.outstanding))


@dataclass(frozen=True)
class Choice:
    """Groups for the next step, and those that have become useless."""

    step: tuple[GroupScored, ...] = ()
    """Empty: not enough are back."""
    too_old: tuple[GroupScored, ...] = ()


def choose(ready: Iterable[GroupScored], updates: int, spec: JobSpec) -> Choice:
    """Pick the groups of the next step: those asked for first, none older than the maximum staleness."""
    usable: list[GroupScored] = []
    too_old: list[GroupScored] = []
    for group in sorted(ready, key=lambda group: (group.group.index, group.group.round)):
        fresh = updates - version_of(group) <= spec.algorithm.max_staleness
        (usable if fresh else too_old).append(group)
    size = spec.algorithm.groups_per_step
    return Choice(step=tuple(usable[:size]) if len(usable) >= size else (), too_old=tuple(too_old))


def group_failure(group: GroupScored) -> str | None:
    """Why a group is of no use; None: it is. One scored episode has nothing to be compared with."""
    if group.failure is not None:
        return group.failure.message
    if len(scored(group)) >= min(2, max(1, len(group.rollouts))) and group.rollouts:
        return None
    reasons = [rollout.failure.message for rollout in group.rollouts if rollout.failure]
    return reasons[0] if reasons else "no episode was played"


def evaluations_due(spec: EvaluationSpec, step: int, steps: int, done: Collection[int]) -> bool:
    """Whether held-out tasks are answered after `step` steps: before the first, every so many, and after the last."""
    if not spec.tasks or step in done:
        return False
    return step in (0, steps) or (spec.every > 0 and step % spec.every == 0)


def report(step: int, groups: Sequence[GroupScored], updates: int, trained: int) -> StepReport:
    """The step's row of the table, before training has added its part."""
    rollouts = [rollout for group in groups for rollout in scored(group)]
    tokens = sum(len(turn.tokens) for rollout in rollouts for turn in rollout.turns)
    ages = [updates - version_of(group) for group in groups]
    return StepReport(
        step=step,
        reward=sum(rollout.reward for rollout in rollouts) / len(rollouts) if rollouts else 0.0,
        tokens=tokens,
        trained_groups=trained,
        skipped_groups=len(groups) - trained,
        staleness=sum(ages) / len(ages) if ages else 0.0,
        sample_seconds=max((group.play_seconds for group in groups), default=0.0),
    )


def spans(indexes: Iterable[int]) -> list[tuple[int, int]]:
    """The first and the last of each unbroken row of indexes."""
    found: list[tuple[int, int]] = []
    for index in sorted(indexes):
        if found and index == found[-1][1] + 1:
            found[-1] = (found[-1][0], index)
        else:
            found.append((index, index))
    return found


def indexes_asked_for(record: JobRecord) -> set[int]:
    """Indexes of the training groups that a record says are outstanding."""
    return {
        *(index for first, last in record.asked for index in range(first, last + 1)),
        *(key.index for key in record.outstanding if key.split == "train"),
    }


def step_began(record: JobRecord, now: float) -> float:
    """When the present step of a job that goes on began; a pause does not count."""
    if not record.step_began:
        return now
    return record.step_began + (now - record.paused if record.paused is not None else 0.0)


def retry_seconds(failures: int) -> float:
    """How long a job rests whose driving has failed so many times in a row, by something that may pass."""
    return float(min(MOST_REST, 2 ** min(failures, 10)))


def versions_to_delete(published: Collection[int], needed: Collection[int], keep: int) -> list[int]:
    """Versions of a job's policy that nobody will ask for: neither needed nor among the `keep` newest."""
    newest = sorted(published)[-keep:] if keep else []
    return sorted(set(published) - set(newest) - set(needed))


def reward_names(reward: RewardSpec) -> list[str]:
    """All rewards that a specification names, those inside mixtures too."""
    parts = reward.params.get("parts", []) if reward.name == "weighted" else []
    inner = [part["name"] for part in parts if isinstance(part, dict) and isinstance(part.get("name"), str)]
    return [reward.name, *inner]
