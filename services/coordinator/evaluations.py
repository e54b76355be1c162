"""Gathers the answers to held-out tasks. Plain data, no waiting."""

from __future__ import annotations

from statistics import fmean

from services.coordinator.advantages import scored
from shared.contracts.episodes import GroupKey, GroupScored
from shared.contracts.jobs import Evaluation, EvaluationSpec


class Evaluations:
    """The evaluations of one job that have begun."""

    def __init__(self, spec: EvaluationSpec) -> None:
        self._spec = spec
        self._open: dict[int, dict[int, float | None]] = {}

    def begin(self, step: int) -> None:
        """Expect the answers of one evaluation."""
        self._open.setdefault(step, {})

    def expects(self, group: GroupKey) -> bool:
        """Whether this answer is still missing."""
        return group.round in self._open and group.index not in self._open[group.round]

    def take(self, group: GroupScored) -> Evaluation | None:
        """Take an answer in. The outcome, if it was the last one."""
        step = group.group.round
        answers = self._open[step]
        rollouts = scored(group)
        answers[group.group.index] = fmean(rollout.reward for rollout in rollouts) if rollouts else None
        if len(answers) < self._spec.tasks:
            return None
        del self._open[step]
        rewards = [answer for answer in answers.values() if answer is not None]
        return Evaluation(
            step=step,
            accuracy=fmean(rewards) if rewards else None,
            tasks=len(answers),
            failed=len(answers) - len(rewards),
        )
