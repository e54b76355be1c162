"""Drives one job from where its record says it stands to its end.

| waits for | unblocked by |
|---|---|
| scored groups on `rl.v1.rollouts.<job>` | environment and reward |
| a step's operations to be answered | the trainer that leases the run |
| its owner's wish (pause, cancel) | the `jobs` bucket |

Everything that a restart needs is in the job's record before anything follows from it: a step's groups are written
down before its operations go out, so a coordinator that comes back sends the same ones again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec

from services.coordinator import policy
from services.coordinator.advantages import has_signal, training_data, training_loss
from services.coordinator.evaluations import Evaluations
from services.coordinator.mismatch import logprob_mismatch
from services.coordinator.operations import step_operations
from services.coordinator.records import Records
from services.coordinator.requests import held_out_group, training_group
from shared import topology
from shared.contracts.base import Failure
from shared.contracts.episodes import GroupKey, GroupScored, PlayGroup
from shared.contracts.jobs import Evaluation, EvaluationPlan, StepPlan, StepReport, Wanted
from shared.contracts.results import Result
from shared.contracts.training import AnyOperation, OperationResult
from shared.errors import MeshError, TemporaryError
from shared.node import Node
from shared.tasks import Tasks

log = logging.getLogger(__name__)

T = TypeVar("T")


class JobFailed(MeshError):
    """The job cannot go on; the message says why."""


class JobDriver:
    """The state machine of one job."""

    def __init__(
        self, node: Node, records: Records, *, max_failed_groups: int, keep_policies: int, patience_s: float
    ) -> None:
        self._node = node
        self._records = records
        self._max_failed = max_failed_groups
        self._patience_s = patience_s
        self._keep_policies = keep_policies
        self._tasks = Tasks(f"{node.replica}/{records.job}")
        self._events: asyncio.Queue[GroupScored | tuple[Result, ...] | MeshError | Wanted] = asyncio.Queue()
        self._ready: dict[GroupKey, GroupScored] = {}
        self._asked: dict[GroupKey, float] = {}
        """When a group that is not back was asked for, by the monotonic clock."""
        self._evaluations = Evaluations(records.spec.evaluation)
        self._training = False
        self._dropped_in_step = 0
        self._failed_in_a_row = 0
        self._step_began = time.monotonic()
        self._train_began = 0.0

    @property
    def activity(self) -> str:
        """For people: where the job is."""
        record = self._records.record
        doing = "training" if self._training else f"waiting for {len(record.outstanding) - len(self._ready)} groups"
        return f"{record.job} step {record.step}/{record.spec.algorithm.steps}, {doing}"

    def wish(self, wanted: Wanted) -> None:
        """Its owner wants something else now."""
        self._events.put_nowait(wanted)

    async def run(self) -> None:
        """Drive the job to its end, or until its owner wants it paused or cancelled."""
        if await self._stopped_by(self._records.record.wanted):
            return
        self._tasks.start("rollouts", self._follow())
        self._tasks.start("patience", self._look_for_lost_groups())
        try:
            await self._begin()
            while not self._finished():
                await self._move()
                if not await self._take(await self._next_event()):
                    return
            await self._records.finish("succeeded", "")
        except JobFailed as error:
            await self._records.finish("failed", str(error))
        finally:
            await self._tasks.stop()

    async def _begin(self) -> None:
        record = self._records.record
        if record.phase != "running":
            await self._records.enter("running", "")
        await self._records.create_run()
        await self._records.tell_again()
        for plan in record.evaluating:
            await self._ask_evaluation(plan)
        # After a restart, ask again for what was asked for: requests are told apart by their keys, so those that
        # were already played, or are being played, are not played twice.
        await self._ask_groups(list(record.outstanding))

    def _finished(self) -> bool:
        record = self._records.record
        return (
            record.step == record.spec.algorithm.steps
            and not self._training
            and not record.evaluating
            and not self._evaluation_due()
        )

    async def _move(self) -> None:
        """Do all that can be done without waiting."""
        if self._evaluation_due():
            record = self._records.record
            plan = EvaluationPlan(step=record.step, policy=record.policy)
            await self._records.save(evaluating=[*record.evaluating, plan])
            await self._ask_evaluation(plan)
        await self._drop_old()
        await self._begin_step()
        await self._ask_more()

    async def _take(self, event: GroupScored | tuple[Result, ...] | MeshError | Wanted) -> bool:
        """Take in what happened. False: the job is not to be driven on."""
        if isinstance(event, MeshError):
            raise JobFailed(str(event))
        if isinstance(event, GroupScored):
            await self._take_group(event)
        elif isinstance(event, tuple):
            await self._end_step(event)
        else:
            return not await self._stopped_by(event)
        return True

    async def _stopped_by(self, wanted: Wanted) -> bool:
        """Whether the job ends or pauses here because its owner wants it."""
        if wanted == "cancel":
            await self._records.finish("cancelled", "cancelled by its owner")
        elif wanted == "pause":
            await self._records.enter("paused", "paused by its owner")
        return wanted != "run"

    async def _next_event(self) -> GroupScored | tuple[Result, ...] | MeshError | Wanted:
        """What happens next. Raise what one of this job's own tasks failed with."""
        waiting = asyncio.ensure_future(self._events.get())
        failing = asyncio.ensure_future(self._tasks.wait())
        try:
            await asyncio.wait([waiting, failing], return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                failing.result()
            return await waiting
        finally:
            waiting.cancel()
            failing.cancel()

    # -- groups --------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        async for delivery in self._node.bus.follow(topology.SCORED, job=self._records.job):
            self._events.put_nowait(delivery.message)

    async def _look_for_lost_groups(self) -> None:
        """Give up groups that do not come back: whoever played one may have died each time it was given out."""
        while True:
            await asyncio.sleep(self._patience_s / 10)
            now = time.monotonic()
            overdue = [key for key, asked in self._asked.items() if now - asked > self._patience_s]
            for key in overdue:
                self._asked.pop(key, None)
                failure = Failure(message=f"group {key} did not come back in {self._patience_s:g} s")
                self._events.put_nowait(GroupScored(job=self._records.job, group=key, failure=failure))

    async def _take_group(self, group: GroupScored) -> None:
        record = self._records.record
        self._asked.pop(group.group, None)
        held_out = group.group.split == "held_out"
        expected = self._evaluations.expects(group.group) if held_out else group.group in record.outstanding
        if not expected or group.group in self._ready:
            return
        reason = policy.group_failure(group)
        self._count_failure(group, reason)
        if held_out:
            await self._take_evaluated(group)
        elif reason is not None:
            rest = [key for key in record.outstanding if key != group.group]
            await self._records.save(outstanding=rest, failed_groups=record.failed_groups + 1)
        else:
            self._ready[group.group] = group

    def _count_failure(self, group: GroupScored, reason: str | None) -> None:
        if reason is None:
            self._failed_in_a_row = 0
            return
        self._failed_in_a_row += 1
        log.warning("group %s of job %s failed: %s", group.group, self._records.job, reason)
        if self._failed_in_a_row >= self._max_failed:
            raise JobFailed(f"{self._failed_in_a_row} groups failed one after another; the last one: {reason}")

    async def _ask_more(self) -> None:
        record = self._records.record
        in_training = len(record.plan.groups) if record.plan else 0
        standing = policy.Standing(
            step=record.step,
            updates=record.updates,
            # A plan whose groups have not been read again after a restart is being trained all the same.
            training=self._training or record.plan is not None,
            outstanding=len(record.outstanding) - in_training,
        )
        count = policy.groups_to_ask_for(standing, record.spec)
        if count == 0:
            return
        keys = [GroupKey(split="train", index=record.next_group + number) for number in range(count)]
        await self._records.save(outstanding=[*record.outstanding, *keys], next_group=record.next_group + count)
        await self._ask_groups(keys)

    async def _ask_groups(self, keys: Sequence[GroupKey]) -> None:
        record = self._records.record
        await asyncio.gather(*(self._publish_group(training_group(record, key)) for key in keys))

    async def _publish_group(self, group: PlayGroup) -> None:
        self._asked[group.group] = time.monotonic()

        def publish() -> Awaitable[int]:
            msg_id = f"{group.job}/{group.group}"
            return self._node.bus.publish(topology.GROUPS, group, msg_id=msg_id, environment=group.environment.name)

        await patiently(publish)

    async def _drop_old(self) -> None:
        record = self._records.record
        if record.plan is not None:
            return
        old = [group.group for group in policy.choose(self._ready.values(), record.updates, record.spec).too_old]
        if not old:
            return
        for key in old:
            del self._ready[key]
        self._dropped_in_step += len(old)
        rest = [key for key in record.outstanding if key not in old]
        await self._records.save(outstanding=rest, dropped_groups=record.dropped_groups + len(old))

    # -- steps ---------------------------------------------------------------------------------------------------

    async def _begin_step(self) -> None:
        if self._training:
            return
        record = self._records.record
        if record.plan is None:
            chosen = policy.choose(self._ready.values(), record.updates, record.spec).step
            if not chosen or record.step == record.spec.algorithm.steps:
                return
            keys = [group.group for group in chosen]
            await self._records.save(plan=StepPlan(step=record.step, first_seq=record.next_seq, groups=keys))
        elif not all(key in self._ready for key in record.plan.groups):
            return  # after a restart, until its groups have been read again
        self._training = True
        self._train_began = time.monotonic()
        self._tasks.start("step", self._train(self._step_operations()))

    def _step_operations(self) -> list[AnyOperation]:
        record = self._records.record
        assert record.plan is not None
        groups, algorithm = self._planned(), record.spec.algorithm
        data, loss = training_data(groups, algorithm), training_loss(groups, algorithm)
        return step_operations(record, record.plan.first_seq, data, loss)

    def _planned(self) -> list[GroupScored]:
        plan = self._records.record.plan
        assert plan is not None
        return [self._ready[key] for key in plan.groups]

    async def _train(self, operations: Sequence[AnyOperation]) -> None:
        try:
            self._events.put_nowait(tuple(await self._send(operations)))
        except MeshError as error:
            self._events.put_nowait(error)

    async def _send(self, operations: Sequence[AnyOperation]) -> list[Result]:
        """Publish operations and wait for all their answers. Raise the first failure."""
        asking = [asyncio.ensure_future(self._ask(operation)) for operation in operations]
        try:
            return await asyncio.gather(*asking)
        finally:
            for task in asking:
                task.cancel()

    async def _ask(self, operation: AnyOperation) -> Result:
        def ask() -> Awaitable[Result]:
            msg_id = f"{operation.run}/{operation.seq}"
            return self._node.bus.ask(topology.OPERATIONS, operation, msg_id=msg_id, run=operation.run)

        return await patiently(ask)

    async def _end_step(self, results: tuple[Result, ...]) -> None:
        record = self._records.record
        plan = record.plan
        assert plan is not None
        groups = self._planned()
        for key in plan.groups:
            del self._ready[key]
        published = next((r.policy for r in results if isinstance(r, OperationResult) and r.policy is not None), None)
        trained = sum(map(has_signal, groups))
        row = self._report(groups, trained, results)
        await self._records.save(
            step=record.step + 1,
            next_seq=plan.first_seq + len(results),
            outstanding=[key for key in record.outstanding if key not in plan.groups],
            updates=record.updates + (1 if trained else 0),
            policy=published.policy if published else record.policy,
            adapter=self._records.place_of(published) if published else record.adapter,
            plan=None,
            skipped_groups=record.skipped_groups + len(groups) - trained,
            last=row,
        )
        self._training = False
        self._dropped_in_step = 0
        self._step_began = time.monotonic()
        await self._records.stepped(row)
        await self._records.delete_policies(self._versions_needed(), self._keep_policies)

    def _report(self, groups: Sequence[GroupScored], trained: int, results: Sequence[Result]) -> StepReport:
        record = self._records.record
        row = policy.report(record.step + 1, groups, record.updates, trained)
        now = time.monotonic()
        seconds = now - self._step_began
        named = [pair for result in results if isinstance(result, OperationResult) for pair in result.metrics.items()]
        named += logprob_mismatch(groups, results, record.updates).items()
        metrics = {name: value for name, value in named if math.isfinite(value)}  # JSON has no others
        return msgspec.structs.replace(
            row,
            loss=metrics.get("loss:sum", 0.0),
            dropped_groups=self._dropped_in_step,
            seconds=seconds,
            train_seconds=now - self._train_began,
            tokens_per_second=row.tokens / seconds if seconds else 0.0,
            metrics=metrics,
        )

    def _versions_needed(self) -> set[int]:
        """Versions that a group or an evaluation which is still out may ask for."""
        record = self._records.record
        oldest = record.updates - record.spec.algorithm.max_staleness - 1
        recent = set(range(max(0, oldest), record.updates + 1))
        return recent | {plan.policy.version for plan in record.evaluating if plan.policy is not None}

    # -- evaluations ---------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        record = self._records.record
        known = {e.step for e in record.evaluations} | {plan.step for plan in record.evaluating}
        return not self._training and policy.evaluations_due(
            record.spec.evaluation, record.step, record.spec.algorithm.steps, known
        )

    async def _ask_evaluation(self, plan: EvaluationPlan) -> None:
        record = self._records.record
        self._evaluations.begin(plan.step)
        await asyncio.gather(
            *(self._publish_group(held_out_group(record, plan, index)) for index in range(record.spec.evaluation.tasks))
        )

    async def _take_evaluated(self, group: GroupScored) -> None:
        outcome = self._evaluations.take(group)
        if outcome is not None:
            await self._end_evaluation(outcome)

    async def _end_evaluation(self, outcome: Evaluation) -> None:
        record = self._records.record
        await self._records.save(
            evaluating=[plan for plan in record.evaluating if plan.step != outcome.step],
            evaluations=sorted([*record.evaluations, outcome], key=lambda evaluation: evaluation.step),
        )
        await self._records.evaluated(outcome)


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Call, and call again after a temporary error: a job outlives a bus that is away and a disk that is full."""
    while True:
        try:
            return await call()
        except TemporaryError as error:
            log.warning("waiting: %s", error)
            await asyncio.sleep(error.delay)
