"""Plays the episodes of one group: prompt, reply, step, prompt, and so on, each episode for itself.

The first prompt is the same for all episodes of a group, so one request gives all first replies and the samplers
prefill it once. From then on an episode waits only for itself. An episode that fails, or is not done within
`episode_timeout_s` of its first reply, is the only one to fail; a `TemporaryError` ends the group, to be played again,
and so does the end of its job, for good.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from services.environment import policy
from services.environment.api import Environment, Play
from services.environment.calls import Calls
from services.environment.metrics import EnvironmentMetrics
from services.environment.pool import Pool
from shared.contracts.arrays import Int32s
from shared.contracts.episodes import Episode, Message, PlayGroup, Task, Turn
from shared.contracts.sampling import SampledSequence
from shared.errors import MeshError, PermanentError, UserError, failure_of
from shared.finished import FinishedJobs
from shared.text import Text

T = TypeVar("T")
log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""For an environment to clean up after an episode; a stopping service waits for it."""


@dataclass(frozen=True)
class Table:
    """What the episodes of a group are played with."""

    group: PlayGroup
    environment: Environment[Any]
    text: Text
    task: Task
    opening: tuple[Message, ...]

    @property
    def name(self) -> str:
        """The environment's registered name."""
        return self.group.environment.name

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation. Raise `UserError` if the model's chat template does not accept it."""
        try:
            return self.text.render(messages)
        except Exception as error:  # templates raise what they like
            raise UserError(
                f"the chat template of {self.group.base_model} does not accept the conversation of environment "
                f"{self.name!r}: {error}"
            ) from error


@dataclass
class Record:
    """An episode as far as it has come."""

    number: int
    play: Play
    started: float
    """When its first reply was asked for, by the monotonic clock."""
    turns: list[Turn] = field(default_factory=list)
    reply: str = ""
    reward: float | None = None
    where: str = "about to begin"
    """What it is doing, for the message if it takes too long."""
    stepping: bool = False
    timed_out: bool = False


class Player:
    """Plays groups."""

    def __init__(self, pool: Pool, calls: Calls, finished: FinishedJobs, metrics: EnvironmentMetrics) -> None:
        self._pool = pool
        self._finished = finished
        self._calls = calls
        self._metrics = metrics

    async def play(self, table: Table) -> list[Episode]:
        """All episodes of a group, in order. Raise an error of the mesh if none could begin, or the job has ended."""
        started = time.monotonic()
        prompt = table.render(table.opening)
        seed = policy.request_seed(table.group, None, 0)
        firsts = await self._pool.sample(table.group, prompt, seed=seed, count=table.group.size)
        return await gathered(
            self._episode(table, Record(number, Play(task=table.task, messages=table.opening), started), prompt, first)
            for number, first in enumerate(firsts)
        )

    async def _episode(self, table: Table, record: Record, prompt: list[int], first: SampledSequence) -> Episode:
        try:
            error = await self._attempt(table, record, prompt, first)
        finally:
            await self._close(table, record)
        outcome = "played" if error is None else "timed_out" if record.timed_out else "failed"
        self._metrics.episodes.labels(table.name, outcome).inc()
        self._metrics.turns.labels(table.name).observe(len(record.turns))
        self._metrics.seconds.labels(table.name).observe(time.monotonic() - record.started)
        return Episode(
            turns=record.turns,
            messages=list(record.play.messages),
            reply=record.reply,
            environment_reward=record.reward,
            failure=None if error is None else failure_of(error),
        )

    async def _attempt(
        self, table: Table, record: Record, prompt: list[int], first: SampledSequence
    ) -> PermanentError | None:
        """Play to the end; what went wrong, if it is this episode's alone."""
        try:
            async with asyncio.timeout(table.group.environment.episode_timeout_s):
                await self._turns(table, record, prompt, first)
            if table.group.reference_logprobs:
                await self._add_reference(table, record)
        except TimeoutError:
            record.timed_out = True
            return policy.too_slow(table.group.environment, record.where)
        except PermanentError as error:
            return error
        return None

    async def _turns(self, table: Table, record: Record, prompt: list[int], sequence: SampledSequence) -> None:
        while True:
            reply = record.reply = table.text.decode(sequence.tokens)
            record.turns.append(turn_of(prompt, sequence))
            before = record.play.messages
            record.play.messages = policy.answered(before, reply)
            if await self._step(table, record, reply):
                return
            self._finished.check(table.group.job)
            prompt = following(table, prompt, sequence, before, record.play.messages)
            record.play.turn += 1
            record.where = f"waiting for the samplers in turn {record.play.turn}"
            seed = policy.request_seed(table.group, record.number, record.play.turn)
            sequence = (await self._pool.sample(table.group, prompt, seed=seed))[0]

    async def _step(self, table: Table, record: Record, reply: str) -> bool:
        """Let the environment answer; whether the episode is over."""
        play = record.play
        what = f"step() of turn {play.turn}"
        record.where = f"in {what}"
        try:
            raw = await self._calls.run(table.name, what, table.environment.step, play, reply)
        finally:
            # Cancelled, that is out of time: the step goes on in its thread.
            record.stepping = isinstance(sys.exception(), asyncio.CancelledError)
        step = policy.checked_step(table.name, raw, play.turn)
        record.reward = policy.total(record.reward, step)
        play.messages = (*play.messages, *step.messages)
        return policy.over(step, play, table.environment.max_turns)

    async def _add_reference(self, table: Table, record: Record) -> None:
        scored = await gathered(
            self._pool.reference_logprobs(table.group, turn.prompt, turn.tokens) for turn in record.turns
        )
        record.turns = [
            msgspec.structs.replace(turn, reference_logprobs=logprobs)
            for turn, logprobs in zip(record.turns, scored, strict=True)
        ]

    async def _close(self, table: Table, record: Record) -> None:
        """Let the environment clean up. What goes wrong in it is logged, and changes nothing about the episode."""
        if record.stepping or type(table.environment).close is Environment.close:
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._calls.run(table.name, "close()", table.environment.close, record.play)
        except (TimeoutError, MeshError) as error:
            log.warning("environment %s did not close an episode: %s", table.name, error or "it hangs")


def turn_of(prompt: Sequence[int], sequence: SampledSequence) -> Turn:
    """A sampled sequence as a turn of an episode."""
    return Turn(
        prompt=Int32s(prompt),
        tokens=sequence.tokens,
        logprobs=sequence.logprobs,
        stop_reason=sequence.stop_reason,
    )


def following(
    table: Table,
    prompt: Sequence[int],
    sequence: SampledSequence,
    before: Sequence[Message],
    now: Sequence[Message],
) -> list[int]:
    """The prompt of the next turn (see `policy.next_prompt`). `before` ends where the reply begins, `now` goes on."""
    unanswered = policy.answered(before, "")
    hollow = [*unanswered, *now[len(unanswered) :]]
    return policy.next_prompt(
        prompt, sequence.tokens, table.render(before), table.render(hollow), lambda: table.render(now)
    )


async def gathered(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of these give, in order. If one fails, the others are cancelled and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item) for item in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
