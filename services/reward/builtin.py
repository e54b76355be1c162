"""The rewards that come with the service. All give 1 for a full success, but for `length_penalty`, a cost."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Literal

import msgspec

from services.reward import answers
from services.reward.api import PlayedEpisode, UserError, checked_by

NotNegative = Annotated[float, msgspec.Meta(ge=0)]


def exact_match(episode: PlayedEpisode, *, case_insensitive: bool = False) -> float:
    """1 if the reply is the task's answer, blanks around both left out; else 0."""
    reply, answer = episode.reply.strip(), answer_of(episode, "exact_match").strip()
    if case_insensitive:
        reply, answer = reply.casefold(), answer.casefold()
    return float(reply == answer)


def numeric(episode: PlayedEpisode, *, tolerance: NotNegative = 1e-6) -> float:
    r"""1 if the reply's answer has the value of the task's; else 0.

    The reply's answer is what its last `\boxed{}` holds, or else its last number (`7`, `-1,234.5`, `1/2`, `50%`).
    Whole numbers must be equal, others may differ by `tolerance` relative to the task's.
    """
    answer = answer_of(episode, "numeric")
    found = answers.final_answer(episode.reply)
    return float(found is not None and answers.same_value(found, answer, tolerance))


def _check_regex(pattern: str, *, match: str = "full") -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"reward 'regex': pattern {pattern!r} is not a regular expression: {error}") from None


@checked_by(_check_regex)
def regex(episode: PlayedEpisode, *, pattern: str, match: Literal["full", "search"] = "full") -> float:
    """1 if the whole reply (`full`), or something in it (`search`), matches; else 0. `.` matches line breaks too."""
    compiled = _compiled(pattern)
    reply = episode.reply
    found = compiled.fullmatch(reply.strip()) if match == "full" else compiled.search(reply)
    return float(found is not None)


def length_penalty(
    episode: PlayedEpisode,
    *,
    budget: Annotated[int, msgspec.Meta(ge=0)],
    per_token: NotNegative = 0.01,
    floor: Annotated[float, msgspec.Meta(le=0)] = -1.0,
) -> float:
    """0 for up to `budget` sampled tokens; each further one takes off `per_token`, down to `floor`."""
    return max(floor, -per_token * max(0, episode.tokens - budget))


def environment_reward(episode: PlayedEpisode) -> float:
    """What the environment gave."""
    if episode.environment_reward is None:
        raise UserError(
            "reward 'environment': the environment gave no reward of its own: choose another, for instance numeric"
        )
    return episode.environment_reward


def answer_of(episode: PlayedEpisode, reward: str) -> str:
    """The task's answer. Raise `UserError` if it has none."""
    if episode.task.answer is None:
        raise UserError(
            f"reward {reward!r}: the task has no answer to compare with: choose another reward, for instance "
            "environment"
        )
    return episode.task.answer


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)
