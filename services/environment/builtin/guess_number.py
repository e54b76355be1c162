"""Guess a number from "higher" and "lower": a conversation of several turns, with the environment's own reward."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from services.environment.api import (
    Environment,
    EnvironmentParams,
    Message,
    Play,
    Split,
    Step,
    Task,
    UserError,
    permuted,
)

SHUFFLE = "guess_number"


class GuessNumberParams(EnvironmentParams):
    """The range, and how long to guess."""

    low: int = 1
    high: int = 100
    max_turns: Annotated[int, msgspec.Meta(ge=1, le=100)] = 8
    held_out: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Numbers kept for evaluation. None: a tenth of all, at least one."""
    shaped: bool = False
    """Give up to 0.5 for a last guess that is close. Helps a policy that never finds the number at first."""


class GuessNumber(Environment[GuessNumberParams]):
    """The reward `environment` is 1 for finding the number; else 0, or less than 0.5 with `shaped`."""

    Params = GuessNumberParams

    def __init__(self, params: GuessNumberParams) -> None:
        """Raise `UserError` for a range that leaves nothing to train on."""
        super().__init__(params)
        self.max_turns = params.max_turns
        self._count = params.high - params.low + 1
        self._held_out = max(1, self._count // 10) if params.held_out is None else params.held_out
        if self._count <= self._held_out:
            raise UserError(
                f"environment 'guess_number' has {max(0, self._count)} numbers from low = {params.low} to high = "
                f"{params.high}, and {self._held_out} of them held out: widen the range, or lower held_out"
            )

    def size(self, split: Split) -> int:
        """See `Environment.size`."""
        return self._held_out if split == "held_out" else self._count - self._held_out

    def task(self, split: Split, index: int, seed: int) -> Task:
        """See `Environment.task`."""
        place = index if split == "held_out" else self._held_out + index
        secret = self.params.low + permuted(place, self._count, SHUFFLE)
        question = (
            f"I think of a whole number from {self.params.low} to {self.params.high}. Guess it. "
            "Reply with one number only; I say whether mine is higher or lower."
        )
        return Task(question=question, answer=str(secret))

    def step(self, play: Play, reply: str) -> Step:
        """See `Environment.step`."""
        secret = int(play.task.answer or "")
        guess = _guess(reply)
        last = play.turn + 1 == self.max_turns
        if guess == secret:
            return Step(done=True, reward=1.0)
        if last:
            return Step(done=True, reward=self._consolation(guess, secret))
        if guess is None:
            return _say("Reply with one whole number.")
        return _say("My number is higher." if secret > guess else "My number is lower.")

    def _consolation(self, guess: int | None, secret: int) -> float:
        if guess is None or not self.params.shaped:
            return 0.0
        return 0.5 * max(0.0, 1.0 - abs(guess - secret) / self._count)


def _guess(reply: str) -> int | None:
    """The last whole number in a reply. Numbers of over 18 digits are none: nobody thought of one."""
    found = re.findall(r"(?<![\d.])-?\d{1,18}(?![\d.]*\d)", reply)
    return int(found[-1]) if found else None


def _say(text: str) -> Step:
    return Step(done=False, messages=[Message(role="user", content=text)])
