"""Played episodes in, rollouts out.

Whatever goes wrong, the coordinator hears of it: what concerns one episode fails that rollout, what concerns the
reward fails the group; any other error is told on the last delivery, before the worker gives the message up.
A group without episodes is answered too, so a reward and its parameters can be checked without playing anything.
"""

from __future__ import annotations

import asyncio
import time

from services.reward import policy
from services.reward.metrics import RewardMetrics
from services.reward.processes import Processes
from services.reward.protocol import Prepare, Refused, Score, Scored
from shared import topology
from shared.bus import Bus, Delivery
from shared.chances import TooOften
from shared.contracts.base import Failure
from shared.contracts.episodes import Episode, GroupScored, RewardSpec, Rollout, ScoreGroup
from shared.errors import PermanentError, TemporaryError, UserError, failure_of
from shared.finished import FinishedJobs, JobEnded


class ScoreHandler:
    """Scores groups and publishes them."""

    def __init__(self, bus: Bus, processes: Processes, finished: FinishedJobs, metrics: RewardMetrics) -> None:
        self._bus = bus
        self._finished = finished
        self._processes = processes
        self._metrics = metrics

    async def handle(self, delivery: Delivery[ScoreGroup]) -> None:
        """Score one group."""
        group = delivery.message
        with self._metrics.running.track_inprogress():
            try:
                await self._publish(group, await self._rollouts(group))
            except JobEnded:
                self._metrics.groups.labels("dropped").inc()
            except PermanentError as error:
                await self._publish(group, [], failure_of(error))
            except (Exception, asyncio.CancelledError) as error:
                # A cancelled group is handed back, but what was delivered for the last time does not come again.
                if topology.GROUP_SCORERS.is_last(error, delivery.deliveries):
                    await self._publish(group, [], last_words(error))
                raise

    async def too_often(self, delivery: Delivery[ScoreGroup], error: TooOften) -> None:
        """Tell of a group that is not tried again."""
        await self._publish(delivery.message, [], failure_of(error))

    async def _rollouts(self, group: ScoreGroup) -> list[Rollout]:
        self._finished.check(group.job)
        await self._prepare(group.reward)
        try:
            async with asyncio.TaskGroup() as tasks:
                scoring = [
                    tasks.create_task(self._rollout(group, number, episode))
                    for number, episode in enumerate(group.episodes)
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in scoring]

    async def _prepare(self, spec: RewardSpec) -> None:
        """Raise `UserError` if there is no such reward, or not with such parameters."""
        async with self._processes.lease() as process:
            try:
                async with asyncio.timeout(spec.timeout_s):
                    answer = await process.ask(Prepare(reward=spec.name, params=spec.params))
            except TimeoutError:
                raise policy.too_slow(spec, "checking its parameters") from None
        if isinstance(answer, Refused):
            raise error_of(answer.failure)

    async def _rollout(self, group: ScoreGroup, number: int, episode: Episode) -> Rollout:
        name = group.reward.name
        if episode.failure is not None:
            self._metrics.episodes.labels(name, "unplayed").inc()
            return Rollout(turns=episode.turns, text=episode.reply, failure=episode.failure)
        outcome, scored = await self._score(group, number, episode)
        self._metrics.episodes.labels(name, outcome).inc()
        if isinstance(scored, Failure):
            return Rollout(turns=episode.turns, text=episode.reply, failure=scored)
        return Rollout(
            turns=episode.turns,
            reward=scored.reward,
            components=scored.components,
            text=episode.reply,
        )

    async def _score(self, group: ScoreGroup, number: int, episode: Episode) -> tuple[str, Scored | Failure]:
        """What became of it, for the metrics, and the score or why there is none."""
        spec, where = group.reward, f"episode {number}"
        question = Score(reward=spec.name, params=spec.params, episode=policy.played(group, episode))
        async with self._processes.lease() as process:
            self._finished.check(group.job)
            started = time.monotonic()
            try:
                async with asyncio.timeout(spec.timeout_s):
                    answer = await process.ask(question)
            except TimeoutError:
                return "timed_out", failure_of(policy.too_slow(spec, where))
            except PermanentError as error:
                return "failed", Failure(message=f"{where}: reward {spec.name!r}: {error}", kind="user")
            finally:
                self._metrics.seconds.labels(spec.name).observe(time.monotonic() - started)
        if isinstance(answer, Scored):
            return "scored", answer
        assert isinstance(answer, Refused)
        return "failed", Failure(message=f"{where}: {answer.failure.message}", kind=answer.failure.kind)

    async def _publish(self, group: ScoreGroup, rollouts: list[Rollout], failure: Failure | None = None) -> None:
        scored = GroupScored(
            job=group.job,
            group=group.group,
            rollouts=rollouts,
            policy=group.policy,
            task=group.task,
            play_seconds=group.play_seconds,
            failure=failure,
        )
        await self._bus.publish(topology.SCORED, scored, msg_id=f"{group.job}/{group.group}/scored", job=group.job)
        self._metrics.groups.labels("scored" if failure is None else "failed").inc()


def last_words(error: BaseException) -> Failure:
    """What to tell of a group that is given up."""
    if isinstance(error, asyncio.CancelledError):
        error = TemporaryError("the reward service was stopped while it scored the group for the last time")
    return failure_of(error)


def error_of(failure: Failure) -> PermanentError:
    """The error that a failure was made of."""
    return (UserError if failure.kind == "user" else PermanentError)(failure.message)
