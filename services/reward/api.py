"""What one implements to add a reward: a function, and an entry point that names it.

    def short(episode: PlayedEpisode, *, limit: int = 100) -> float:
        return 1.0 if len(episode.reply) <= limit else 0.0

It is named in a distribution's entry-point group `openrl.rewards`, or in the service's `plugins` as
`name=module:attribute`. Its keyword parameters are the `params` of a job's reward; their annotations are checked. It
runs in the main thread of a process that is ended when the reward takes longer than the job's `timeout_s`, so it may
block, hang or crash without harm to others. It must give a finite number, and can be called for any episode in any
order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from shared.contracts.base import Contract
from shared.contracts.episodes import Message, Task
from shared.errors import UserError

__all__ = ["Message", "PlayedEpisode", "Reward", "Task", "UserError", "checked_by"]


class PlayedEpisode(Contract):
    """What a reward may look at."""

    task: Task
    """Question, answer if there is one, and the environment's metadata."""
    reply: str = ""
    """The last thing the policy said."""
    messages: list[Message] = []
    """The whole conversation."""
    turns: int = 0
    """How often the policy spoke."""
    tokens: int = 0
    """Tokens that it sampled, over all turns."""
    truncated: bool = False
    """Its last reply ended because it was too long."""
    environment_reward: float | None = None
    """What the environment itself gave."""


Reward = Callable[..., float]
"""`reward(episode, **params)`."""

F = TypeVar("F", bound=Callable[..., Any])
CHECK = "__openrl_check__"


def checked_by(check: Callable[..., None]) -> Callable[[F], F]:
    """Let `check(**params)` look at a reward's parameters before the first episode is scored.

    It raises `UserError` for parameters that have the right type and still cannot work.
    """

    def mark(reward: F) -> F:
        setattr(reward, CHECK, check)
        return reward

    return mark
