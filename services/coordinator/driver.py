"""Drives one job from where its record says it stands to its end.

| waits for | unblocked by |
|---|---|
| scored groups on `rl.v1.rollouts.<job>` | environment and reward |
| a step's operations to be answered | the trainer that leases the run |
| its owner's wish (pause, cancel), at any time | the `jobs` bucket |

Everything that a restart needs is in the job's record before anything follows from it: a step's groups are written
down before its operations go out, so a coordinator that comes back sends the same ones again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from services.coordinator import policy
from services.coordinator.advantages import has_signal, training_data, training_loss
from services.coordinator.asking import Asking
from services.coordinator.config import CoordinatorConfig
from services.coordinator.evaluations import Evaluations
from services.coordinator.mismatch import logprob_mismatch
from services.coordinator.operations import step_operations
from services.coordinator.records import Records
from shared import topology
from shared.contracts.base import Failure
from shared.contracts.episodes import GroupKey, GroupScored
from shared.contracts.jobs import Evaluation, EvaluationPlan, StepPlan, StepReport, Wanted
from shared.contracts.results import Result
from shared.contracts.training import AnyOperation, OperationResult
from shared.errors import MeshError
from shared.node import Node
from shared.scans import Stored
from shared.tasks import Tasks, cancelled

log = logging.getLogger(__name__)

T = TypeVar("T")
Event = GroupScored | tuple[Result, ...] | MeshError

PUBLISHES = 16
"""Groups of one job that are being published at the same time."""
CATCH_UP_SECONDS = 60.0
"""For reading what came back before a restart; what is not read by then is asked for again."""


class JobFailed(MeshError):
    """The job cannot go on; the message says why."""


class Stopped(Exception):
    """Its owner wants it paused or cancelled."""


class JobDriver:
    """The state machine of one job."""

    def __init__(self, node: Node, records: Records, config: CoordinatorConfig, publishing: asyncio.Semaphore) -> None:
        """`publishing` bounds what all drivers publish at the same time."""
        self._node = node
        self._records = records
        self._config = config
        self._tasks = Tasks(f"{node.replica}/{records.job}")
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._wanted: Wanted = "run"
        self._wished = asyncio.Event()
        self._caught_up = asyncio.Event()
        self._ready: dict[GroupKey, GroupScored] = {}
        self._asking = Asking(node.bus, records, config, publishing)
        self._evaluations = Evaluations(records.spec.evaluation)
        self._training = False
        self._dropped_in_step = 0
        self._failed_in_a_row = 0
        self._train_began = 0.0

    @property
    def activity(self) -> str:
        """For people: where the job is."""
        record = self._records.record
        missing = len(self._records.outstanding) - len(self._ready)
        doing = "training" if self._training else f"waiting for {missing} groups"
        return f"{record.job} step {record.step}/{record.spec.algorithm.steps}, {doing}"

    def wish(self, wanted: Wanted) -> None:
        """Its owner wants it to stop: what it waits for is broken off."""
        self._wanted = wanted
        self._wished.set()

    async def run(self) -> None:
        """Drive the job to its end, or until its owner wants it paused or cancelled."""
        if self._records.record.wanted != "run":
            await self._stop(self._records.record.wanted)
            return
        self._tasks.start("patience", self._look_for_lost_groups())
        try:
            await self._begin()
            while not self._finished():
                await self._move()
                await self._take(await self._unless_stopped(self._events.get()))
            await self._records.finish("succeeded", "")
        except Stopped:
            await self._stop(self._wanted)
        except JobFailed as error:
            await self._records.finish("failed", str(error))
        finally:
            await self._tasks.stop()

    async def fail(self, reason: str) -> None:
        """End the job after `run` has raised."""
        await self._records.finish("failed", reason)

    async def _begin(self) -> None:
        record = self._records.record
        if record.phase != "running" or not record.step_began:
            began = policy.step_began(record, time.time())
            await self._records.enter("running", "", step_began=began, paused=None)
        await self._records.create_run()
        await self._records.tell_again()
        for plan in record.evaluating:
            self._begin_evaluation(plan)
        await self._catch_up()
        # After a restart, ask again for what was asked for and is not back: requests are told apart by their keys, so
        # those that are being played are not played twice.
        self._asking.add_training(sorted(self._records.outstanding))

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
            self._begin_evaluation(plan)
        await self._drop_old()
        await self._begin_step()
        await self._ask_more()
        await self._ask()

    async def _take(self, event: Event) -> None:
        """Take in what happened."""
        if isinstance(event, MeshError):
            raise JobFailed(str(event))
        if isinstance(event, GroupScored):
            await self._take_group(event)
        else:
            await self._end_step(event)

    async def _stop(self, wanted: Wanted) -> None:
        if wanted == "cancel":
            await self._records.finish("cancelled", "cancelled by its owner")
        elif wanted == "pause":
            await self._records.enter("paused", "paused by its owner", paused=time.time())

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Do what may be broken off and done again: everything but writing the record.

        Raise `Stopped` as soon as the owner wants it, and what one of this job's own tasks failed with.
        """
        working = asyncio.create_task(work)
        failing = asyncio.create_task(self._tasks.wait())
        wished = asyncio.create_task(self._wished.wait())
        try:
            await asyncio.wait([working, failing, wished], return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                failing.result()
            if wished.done():
                raise Stopped
            return await working
        finally:
            await cancelled([working, failing, wished])

    # -- groups --------------------------------------------------------------------------------------------------

    async def _follow(self, place: int) -> None:
        """Hear of all groups; those up to `place` were there before."""

        async def passed_over(raw: Stored, _: MeshError) -> None:
            self._read_up_to(raw.seq, place)

        self._read_up_to(0, place)
        follow = self._node.bus.follow(topology.SCORED, job=self._records.job, on_unreadable=passed_over)
        async for delivery in follow:
            self._events.put_nowait(delivery.message)
            self._read_up_to(delivery.seq, place)

    def _read_up_to(self, seq: int, place: int) -> None:
        if seq >= place:
            self._caught_up.set()

    async def _catch_up(self) -> None:
        """Take in what came back while nobody drove the job, so that it is not asked for again."""

        def last_place() -> Awaitable[int]:
            return self._node.bus.last_place(topology.SCORED, job=self._records.job)

        place = await self._unless_stopped(self._records.patience(last_place))
        self._tasks.start("rollouts", self._follow(place))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await self._unless_stopped(self._caught_up.wait())
        while not self._events.empty():
            await self._take(self._events.get_nowait())

    async def _look_for_lost_groups(self) -> None:
        """Give up groups that do not come back: whoever played one may have died each time it was given out."""
        while True:
            patience = self._config.group_patience_s
            for key in self._asking.lost():
                failure = Failure(message=f"group {key} did not come back in {patience:g} s")
                self._events.put_nowait(GroupScored(job=self._records.job, group=key, failure=failure))
            await asyncio.sleep(patience / 10)

    async def _take_group(self, group: GroupScored) -> None:
        held_out = group.group.split == "held_out"
        self._asking.back(group.group)
        if not (self._evaluations.expects(group.group) if held_out else self._expects(group.group)):
            return
        reason = policy.group_failure(group)
        self._count_failure(group, reason)
        if held_out:
            await self._take_evaluated(group)
        elif reason is not None:
            failed = self._records.record.failed_groups + 1
            rest = self._records.outstanding - {group.group.index}
            await self._records.save_outstanding(rest, failed_groups=failed)
        else:
            self._ready[group.group] = group

    def _expects(self, key: GroupKey) -> bool:
        """Whether this training group is still missing."""
        return key.round == 0 and key.index in self._records.outstanding and key not in self._ready

    def _count_failure(self, group: GroupScored, reason: str | None) -> None:
        if reason is None:
            self._failed_in_a_row = 0
            return
        self._failed_in_a_row += 1
        log.warning("group %s of job %s failed: %s", group.group, self._records.job, reason)
        if self._failed_in_a_row >= self._config.max_failed_groups:
            raise JobFailed(f"{self._failed_in_a_row} groups failed one after another; the last one: {reason}")

    async def _ask_more(self) -> None:
        record = self._records.record
        in_training = len(record.plan.groups) if record.plan else 0
        standing = policy.Standing(
            step=record.step,
            updates=record.updates,
            # A plan whose groups have not been read again after a restart is being trained all the same.
            training=self._training or record.plan is not None,
            outstanding=len(self._records.outstanding) - in_training,
        )
        count = policy.groups_to_ask_for(standing, record.spec)
        if count == 0:
            return
        new = range(record.next_group, record.next_group + count)
        await self._records.save_outstanding({*self._records.outstanding, *new}, next_group=new.stop)
        self._asking.add_training(new)

    async def _ask(self) -> None:
        """Ask for what the windows have room for."""
        for groups in self._asking.next(self._expects, self._evaluations.expects):
            await self._unless_stopped(self._asking.publish(groups))

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
        rest = self._records.outstanding - {key.index for key in old}
        await self._records.save_outstanding(rest, dropped_groups=record.dropped_groups + len(old))

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
        asking = [asyncio.ensure_future(self._send_one(operation)) for operation in operations]
        try:
            return await asyncio.gather(*asking)
        finally:
            for task in asking:
                task.cancel()

    async def _send_one(self, operation: AnyOperation) -> Result:
        def ask() -> Awaitable[Result]:
            msg_id = f"{operation.run}/{operation.seq}"
            return self._node.bus.ask(topology.OPERATIONS, operation, msg_id=msg_id, run=operation.run)

        return await self._records.patience(ask)

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
        await self._records.save_outstanding(
            self._records.outstanding - {key.index for key in plan.groups},
            step=record.step + 1,
            next_seq=plan.first_seq + len(results),
            updates=record.updates + (1 if trained else 0),
            policy=published.policy if published else record.policy,
            adapter=self._records.place_of(published) if published else record.adapter,
            plan=None,
            skipped_groups=record.skipped_groups + len(groups) - trained,
            last=row,
            step_began=time.time(),
        )
        self._training = False
        self._dropped_in_step = 0
        await self._records.stepped(row)
        await self._records.delete_policies(self._versions_needed(), self._config.keep_policies)

    def _report(self, groups: Sequence[GroupScored], trained: int, results: Sequence[Result]) -> StepReport:
        record = self._records.record
        row = policy.report(record.step + 1, groups, record.updates, trained)
        # From the record, since whoever drove the job when the step began may be gone.
        seconds = max(0.0, time.time() - record.step_began)
        named = [pair for result in results if isinstance(result, OperationResult) for pair in result.metrics.items()]
        named += logprob_mismatch(groups, results, record.updates).items()
        metrics = {name: value for name, value in named if math.isfinite(value)}  # JSON has no others
        return msgspec.structs.replace(
            row,
            loss=metrics.get("loss:sum", 0.0),
            dropped_groups=self._dropped_in_step,
            seconds=seconds,
            train_seconds=time.monotonic() - self._train_began,
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

    def _begin_evaluation(self, plan: EvaluationPlan) -> None:
        self._evaluations.begin(plan.step)
        self._asking.add_evaluation(plan.step)

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
