"""What one implements to add an environment: one class or one function, and an entry point that names it.

A class, for conversations of any length:

    class Params(EnvironmentParams):
        words: list[str]

    class Reverse(Environment[Params]):
        Params = Params
        def task(self, split, index, seed): ...     # the index-th task
        def step(self, play, reply): ...            # what the environment says to a reply

or a function, for a single reply that a reward judges:

    def capitals(split, index, seed, *, country: str = "any") -> Task: ...

Either is named in a distribution's entry-point group `openrl.environments`, or in the service's `plugins` as
`name=module:attribute`. All of it runs in threads, under the job's `episode_timeout_s`: it may block, but what it
shares between episodes must bear being used from several threads at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from services.environment.shuffle import permuted
from shared.contracts.base import Contract, Strict
from shared.contracts.episodes import Message, Split, Task
from shared.errors import UserError

__all__ = [
    "Environment",
    "EnvironmentParams",
    "Message",
    "NoParams",
    "Play",
    "Split",
    "Step",
    "Task",
    "UserError",
    "permuted",
]


class EnvironmentParams(Strict):
    """Base of an environment's parameters: a typed struct, so that a wrong or misspelt one is named to the user."""


class NoParams(EnvironmentParams):
    """For an environment that has none."""


class Step(Contract):
    """What the environment makes of one reply."""

    done: bool
    """The episode is over."""
    messages: list[Message] = []
    """What the policy is told next, from `user` or `system`. Needed unless the episode is over."""
    reward: float | None = None
    """The environment's own judgement; an episode's is the sum over its steps. None: it leaves this to a reward."""


@dataclass
class Play:
    """One episode as far as it has come. Nobody else sees it, so `state` may hold anything."""

    task: Task
    messages: tuple[Message, ...]
    """The conversation, the reply to step on included."""
    turn: int = 0
    """How many replies came before this one."""
    state: Any = field(default=None)
    """For the environment to keep things in, from one step to the next."""


P = TypeVar("P", bound=EnvironmentParams)


class Environment(ABC, Generic[P]):
    """An environment with given parameters. One object serves many episodes at once."""

    Params: type[P]
    """The type of `params`. Without it the environment takes none."""
    max_turns: int = 1
    """An episode ends after so many replies, whatever `step` says."""

    def __init__(self, params: P) -> None:
        """Override to look at the parameters more closely. Raise `UserError` if they cannot work."""
        self.params = params

    def size(self, split: Split) -> int | None:
        """How many tasks there are. None: as many as one asks for."""
        return None

    @abstractmethod
    def task(self, split: Split, index: int, seed: int) -> Task:
        """Task number `index`, always the same one for the same arguments.

        With a `size`, index is below it; the service goes through all training tasks in an order that the job's seed
        shuffles, then again in another. Without one, index counts up. No `held_out` task may be a `train` task,
        whatever the seeds.
        """

    def start(self, task: Task) -> Sequence[Message]:
        """The opening of every episode of a task."""
        return [Message(role="user", content=task.question)]

    def step(self, play: Play, reply: str) -> Step:
        """Answer the policy's reply. As it stands: one reply is all, and a reward judges it."""
        return Step(done=True)

    def close(self, play: Play) -> None:
        """Let go of what `play.state` holds. Called once, however the episode ended, but not while a step hangs."""
        return
