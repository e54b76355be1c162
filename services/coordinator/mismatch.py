"""How well sampler and trainer agree: the same weights must give the same tokens the same log-probabilities. Pure.

What they differ by is an error in every importance ratio that a loss computes. It can only be told from the ratio where
the policy that sampled a group is the one that the step trains on: there the ratio before the update should be 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.coordinator.advantages import trained_turns
from services.coordinator.policy import version_of
from shared.contracts.arrays import Float32s
from shared.contracts.episodes import GroupScored
from shared.contracts.results import Result
from shared.contracts.training import OperationResult

MISMATCH = "logprob_mismatch:mean"
"""Among a step's metrics."""


def logprob_mismatch(groups: Sequence[GroupScored], results: Sequence[Result], updates: int) -> dict[str, float]:
    """Mean absolute difference over the sampled tokens of the groups that version `updates` sampled, as a metric.

    `results` are those of the step's operations on `training_data(groups, …)`. Empty if there are no such tokens.
    """
    trained = [lp for result in results if isinstance(result, OperationResult) for lp in result.logprobs]
    differences = list(_differences(groups, trained, updates))
    return {MISMATCH: sum(differences) / len(differences)} if differences else {}


def _differences(groups: Sequence[GroupScored], trained: Sequence[Float32s], updates: int) -> Iterator[float]:
    for (group, turn), logprobs in zip(trained_turns(groups), trained, strict=False):
        if version_of(group) == updates:
            own = logprobs[len(turn.prompt) - 1 :]
            yield from (abs(one - other) for one, other in zip(own, turn.logprobs, strict=False))
