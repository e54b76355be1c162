"""Whether tasks can be had from an environment with given parameters: asked before a job is accepted.

What needs no more than the parameters' types is told all at once. Then the environment is made, asked how many tasks
it has, and for the first one of training: what is wrong with it shows there, and not when the job has begun.
"""

from __future__ import annotations

import asyncio
from typing import Any

from services.environment import policy
from services.environment.api import Environment, Task
from services.environment.calls import Calls, Once
from services.environment.registry import Registry
from shared import wire
from shared.bus import Bus, Delivery
from shared.contracts.checks import CheckAnswer, CheckEnvironment
from shared.contracts.episodes import EnvironmentSpec, GroupKey, Split
from shared.contracts.jobs import FieldError
from shared.errors import TemporaryError, UserError
from shared.tasks import Tasks

LOADING_SECONDS = 300.0
"""For an environment's constructor. Whoever asked does not wait so long, but finds it loaded when asking again."""
CALL_SECONDS = 15.0
"""For each other call."""
KEPT = 8
"""Environments that are kept, for those who mend their job and ask again."""


class Checks:
    """Answers questions about environments."""

    def __init__(self, bus: Bus, registry: Registry, calls: Calls, tasks: Tasks) -> None:
        self._bus = bus
        self._registry = registry
        self._calls = calls
        self._environments: Once[bytes, Environment[Any]] = Once(tasks, KEPT)

    async def handle(self, delivery: Delivery[CheckEnvironment]) -> None:
        """Answer one question."""
        question = delivery.message
        errors = self._registry.errors(question.name, question.params, question.path)
        if not errors:
            errors = await self._tried(question)
        await self._bus.answer(CheckAnswer(request_id=question.request_id, errors=errors))

    async def _tried(self, question: CheckEnvironment) -> list[FieldError]:
        """What is wrong although all parameters have the right types."""
        path = f"{question.path}.params"
        try:
            environment = await self._environment(question)
            await self._first_task(question, environment)
            path = "evaluation.tasks"
            if question.held_out:
                await self._number(question, environment, "held_out", question.held_out - 1)
        except UserError as error:
            return [FieldError(path=path, message=str(error))]
        except TemporaryError:  # worth trying again: the job will
            return []
        return []

    async def _environment(self, question: CheckEnvironment) -> Environment[Any]:
        spec = EnvironmentSpec(name=question.name, params=question.params)
        key = wire.encode(spec, json=False)

        async def made() -> Environment[Any]:
            async with asyncio.timeout(LOADING_SECONDS):
                return await self._calls.run(spec.name, "its constructor", self._registry.make, spec)

        return await self._environments.get(key, made)

    async def _first_task(self, question: CheckEnvironment, environment: Environment[Any]) -> None:
        number = await self._number(question, environment, "train", 0)
        what = f"task('train', {number})"
        task: object = await self._call(question, what, environment.task, "train", number, question.seed)
        if not isinstance(task, Task):
            raise UserError(f"environment {question.name!r} returned {task!r:.200} from {what}: it must return a Task")

    async def _number(self, question: CheckEnvironment, environment: Environment[Any], split: Split, index: int) -> int:
        """Number of the group's task. Raise `UserError` if there is none."""
        given = await self._call(question, f"size({split!r})", environment.size, split)
        size = policy.checked_size(question.name, split, given)
        return policy.task_number(question.name, size, GroupKey(split=split, index=index), question.seed)

    async def _call(self, question: CheckEnvironment, what: str, *call: Any) -> Any:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await self._calls.run(question.name, what, *call)
        except TimeoutError:
            raise UserError(
                f"environment {question.name!r} was not done with {what} in {CALL_SECONDS:g} s: mend what hangs, and "
                "submit the job again"
            ) from None
