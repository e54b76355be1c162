"""From scored groups to training data. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.episodes import GroupScored, Rollout, Turn
from shared.contracts.jobs import AlgorithmSpec
from shared.contracts.training import Datum, LossSpec
from shared.loss_params import PENALTIES, loss_params

DEVIATION_EPS = 1e-6


def scored(group: GroupScored) -> list[Rollout]:
    """The group's rollouts that have a reward."""
    return [rollout for rollout in group.rollouts if rollout.failure is None]


def has_signal(group: GroupScored) -> bool:
    """Whether there is something to learn: a group whose rewards are all equal has only zero advantages."""
    rollouts = scored(group)
    rewards = [rollout.reward for rollout in rollouts]
    said_anything = any(turn.tokens for rollout in rollouts for turn in rollout.turns)
    return len(rewards) > 1 and max(rewards) > min(rewards) and said_anything


def group_advantages(rewards: Sequence[float], *, by_deviation: bool) -> list[float]:
    """Rewards relative to their group: r - mean(r), optionally over the standard deviation.

    GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1) divides by the deviation; Liu et al. 2025 (arXiv:2503.20783)
    show that this favours tasks that are nearly always or nearly never solved, and leave it out.
    """
    mean = fmean(rewards)
    scale = pstdev(rewards) + DEVIATION_EPS if by_deviation else 1.0
    return [(reward - mean) / scale for reward in rewards]


def trained_episodes(groups: Sequence[GroupScored]) -> int:
    """Number of rollouts that a step trains on."""
    return sum(len(scored(group)) for group in groups if has_signal(group))


def trained_turns(groups: Sequence[GroupScored]) -> list[tuple[GroupScored, Turn]]:
    """The turns that `training_data` makes data of, in the same order."""
    rollouts = [(group, rollout) for group in groups if has_signal(group) for rollout in scored(group)]
    return [(group, turn) for group, rollout in rollouts for turn in rollout.turns if turn.tokens]


def training_loss(groups: Sequence[GroupScored], algorithm: AlgorithmSpec) -> LossSpec:
    """The loss for `training_data`. Its penalties are divided as the advantages are, which they weigh against."""
    params = loss_params(algorithm.loss, algorithm.loss_params)
    for name in PENALTIES & params.keys():
        params[name] /= max(1, trained_episodes(groups))
    return LossSpec(name=algorithm.loss, params=params)


def training_data(groups: Sequence[GroupScored], algorithm: AlgorithmSpec) -> list[Datum]:
    """Data for one step: a datum for each turn of each rollout of the groups that have a signal.

    The loss sums over tokens; advantages are divided by the number of rollouts, so that it is a mean over episodes and
    clipping by norm means the same for any batch size.
    """
    data: list[Datum] = []
    episodes = trained_episodes(groups)
    for rollouts in (scored(group) for group in groups if has_signal(group)):
        rewards = [rollout.reward for rollout in rollouts]
        advantages = group_advantages(rewards, by_deviation=algorithm.normalize_by_deviation)
        for rollout, advantage in zip(rollouts, advantages, strict=True):
            data += [_datum(turn, advantage, algorithm.kl_coeff, episodes) for turn in rollout.turns if turn.tokens]
    return data


def _datum(turn: Turn, advantage: float, kl_coeff: float, episodes: int) -> Datum:
    """Inputs shifted by one against targets; only the policy's own tokens count."""
    context = len(turn.prompt) - 1
    tokens = [*turn.prompt, *turn.tokens]
    padding = [0.0] * context
    return Datum(
        tokens=Int32s(tokens[:-1]),
        targets=Int32s(tokens[1:]),
        weights=Float32s([*padding, *[1.0] * len(turn.tokens)]),
        logprobs=Float32s([*padding, *turn.logprobs]),
        advantages=Float32s([*padding, *_token_advantages(turn, advantage, kl_coeff, episodes)]),
    )


def _token_advantages(turn: Turn, advantage: float, kl_coeff: float, episodes: int) -> list[float]:
    """The episode's advantage at each token, less kl_coeff * (log p - log p_base) at that token."""
    if not kl_coeff or turn.reference_logprobs is None:
        return [advantage / episodes] * len(turn.tokens)
    ratios = [own - base for own, base in zip(turn.logprobs, turn.reference_logprobs, strict=True)]
    return [(advantage - kl_coeff * (ratio if math.isfinite(ratio) else 0.0)) / episodes for ratio in ratios]
