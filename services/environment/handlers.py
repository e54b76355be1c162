"""A group to play, in; a group to score, or the failure of the group, out.

Whatever goes wrong, the coordinator hears of it: an error that trying again does not mend is published as the group's
result at once, and any other one on the last delivery, before the worker gives the message up. The exception is a job
that has ended: nobody waits for its groups, so they are dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from services.environment import policy
from services.environment.api import Environment
from services.environment.calls import Calls, Once
from services.environment.metrics import EnvironmentMetrics
from services.environment.player import Player, Table
from services.environment.registry import Registry
from shared import topology, wire
from shared.bus import Bus, Delivery
from shared.chances import TooOften
from shared.contracts.episodes import EnvironmentSpec, GroupScored, PlayGroup, ScoreGroup, Task
from shared.errors import PermanentError, TemporaryError, UserError, failure_of
from shared.finished import FinishedJobs, JobEnded
from shared.tasks import Tasks
from shared.text import Text, chat_tokenizer

T = TypeVar("T")


class Tables:
    """Gets ready what a group is played with: tokenizer, environment, task and opening."""

    def __init__(self, registry: Registry, calls: Calls, models: Mapping[str, str], tasks: Tasks) -> None:
        self._registry = registry
        self._calls = calls
        self._models = models
        self._texts: Once[str, Text] = Once(tasks)
        self._environments: Once[bytes, Environment[Any]] = Once(tasks)

    async def prepare(self, group: PlayGroup) -> Table:
        """Raise `UserError` that says what is wrong with the group."""
        spec = group.environment
        environment = await self._environments.get(wire.encode(spec, json=False), lambda: self._make(spec))
        task = await self._task(group, environment)
        opening = await self._call(spec, "start()", environment.start, task)
        text = await self._texts.get(group.base_model, lambda: self._load_text(group.base_model))
        return Table(group, environment, text, task, policy.checked_opening(spec.name, opening))

    async def _load_text(self, base_model: str) -> Text:
        if base_model not in self._models:
            known = ", ".join(sorted(self._models)) or "none"
            raise UserError(
                f"the environment service knows no tokenizer of base model {base_model!r}: add it to its `models` "
                f"(there: {known})"
            )
        return await asyncio.to_thread(chat_tokenizer, self._models[base_model])

    async def _make(self, spec: EnvironmentSpec) -> Environment[Any]:
        return await self._call(spec, "its constructor", self._registry.make, spec)

    async def _task(self, group: PlayGroup, environment: Environment[Any]) -> Task:
        spec, key = group.environment, group.group
        raw_size = await self._call(spec, f"size({key.split!r})", environment.size, key.split)
        size = policy.checked_size(spec.name, key.split, raw_size)
        number = policy.task_number(spec.name, size, key, group.task_seed)
        what = f"task({key.split!r}, {number})"
        task: object = await self._call(spec, what, environment.task, key.split, number, group.task_seed)
        if not isinstance(task, Task):
            raise UserError(f"environment {spec.name!r} returned {task!r:.200} from {what}: it must return a Task")
        return task

    async def _call(self, spec: EnvironmentSpec, what: str, function: Callable[..., T], *args: Any) -> T:
        try:
            async with asyncio.timeout(spec.episode_timeout_s):
                return await self._calls.run(spec.name, what, function, *args)
        except TimeoutError:
            raise policy.too_slow(spec, f"in {what}") from None


class GroupHandler:
    """Plays groups and publishes them."""

    def __init__(
        self, bus: Bus, tables: Tables, player: Player, finished: FinishedJobs, metrics: EnvironmentMetrics
    ) -> None:
        self._bus = bus
        self._finished = finished
        self._tables = tables
        self._player = player
        self._metrics = metrics

    async def handle(self, delivery: Delivery[PlayGroup]) -> None:
        """Play one group."""
        group = delivery.message
        with self._metrics.running.track_inprogress():
            try:
                await self._play(group)
            except JobEnded:
                self._metrics.groups.labels("dropped").inc()
            except PermanentError as error:
                await self._fail(group, error)
            except (Exception, asyncio.CancelledError) as error:
                # A cancelled group is handed back, but what was delivered for the last time does not come again.
                if topology.GROUP_PLAYERS.is_last(error, delivery.deliveries):
                    await self._fail(group, error)
                raise

    async def too_often(self, delivery: Delivery[PlayGroup], error: TooOften) -> None:
        """Tell of a group that is not tried again."""
        await self._fail(delivery.message, error)

    async def _play(self, group: PlayGroup) -> None:
        started = time.monotonic()
        self._finished.check(group.job)
        table = await self._tables.prepare(group)
        episodes = await self._player.play(table)
        self._finished.check(group.job)
        played = ScoreGroup(
            job=group.job,
            group=group.group,
            reward=group.reward,
            task=table.task,
            episodes=episodes,
            policy=group.policy,
            play_seconds=time.monotonic() - started,
            owner=group.owner,
        )
        msg_id = f"{group.job}/{group.group}/played"
        await self._bus.publish(topology.PLAYED, played, msg_id=msg_id, reward=group.reward.name)
        self._metrics.groups.labels("played").inc()

    async def _fail(self, group: PlayGroup, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            error = TemporaryError("the environment service was stopped while it played the group for the last time")
        scored = GroupScored(job=group.job, group=group.group, policy=group.policy, failure=failure_of(error))
        await self._bus.publish(topology.SCORED, scored, msg_id=f"{group.job}/{group.group}/scored", job=group.job)
        self._metrics.groups.labels("failed").inc()
