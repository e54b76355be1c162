"""Operations in, results out.

An operation that changes only memory (a pass, a step) is done once and its answer sent until it is stored; it is
durable by the log. One that reads or writes files (`saves`, `loads`) can be done again without harm, and is, after a
temporary error; but one that was answered is not, since the world may have changed: a checkpoint that was deleted does
not come back, and a load that failed does not succeed later, under operations that have gone on without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

from services.trainer.answers import Answers, result_of
from services.trainer.engine_thread import EngineThread
from services.trainer.engines.base import NoRoom, PassItem, PassOutcome, StepOutcome
from services.trainer.fair import Piece
from services.trainer.held import HeldRun
from services.trainer.loads import Loads
from services.trainer.metrics import TrainerMetrics
from services.trainer.places import Places
from services.trainer.policy import tokens_of
from services.trainer.saves import Saves
from shared.bus import Delivery
from shared.contracts.results import RequestFailed
from shared.contracts.training import (
    AnyOperation,
    CreateRun,
    ForwardBackward,
    LoadState,
    OperationResult,
    OptimStep,
    Refused,
    SaveExternal,
    SavePolicy,
    SaveState,
)
from shared.errors import MeshError, PermanentError, TemporaryError, UserError, failure_of
from shared.node import Node
from shared.usage import Usage


def goes_aside(operation: AnyOperation) -> bool:
    """Whether an operation reads or writes files, so that other runs must not wait for it."""
    if isinstance(operation, CreateRun):
        return operation.source is not None
    return isinstance(operation, (SavePolicy, SaveState, SaveExternal, LoadState))


def needs_device(operation: AnyOperation) -> bool:
    """Whether a run must be on the device for an operation."""
    return not isinstance(operation, (LoadState, Refused))


class Operations:
    """Executes operations on the engine and answers them."""

    def __init__(
        self,
        node: Node,
        engine: EngineThread,
        metrics: TrainerMetrics,
        places: Places,
        answers: Answers,
        saves: Saves,
        loads: Loads,
        usage: Usage,
    ) -> None:
        self._node = node
        self._answers = answers
        self._engine = engine
        self._metrics = metrics
        self._places = places
        self._saves = saves
        self._loads = loads
        self._usage = usage

    async def run_pass(self, runs: Sequence[HeldRun], pieces: Sequence[Piece]) -> list[HeldRun]:
        """Forward and backward for several runs at once; `pieces` are of their heads. Return whose heads are done."""
        items = [_item(_as(ForwardBackward, held.head), piece) for held, piece in zip(runs, pieces, strict=True)]
        started = time.monotonic()
        outcomes = await self._engine.call(self._engine.engine.forward_backward, items)
        self._metrics.pass_seconds.observe(time.monotonic() - started)
        self._metrics.pass_runs.observe(len(items))
        self._metrics.passes.inc()
        done = []
        for held, piece, item, outcome in zip(runs, pieces, items, outcomes, strict=True):
            self._metrics.tokens.labels(held.record.owner).inc(sum(len(datum.tokens) for datum in item.data))
            if isinstance(outcome.error, NoRoom):
                self._finish(held, await self._alone(held, outcome))
            elif outcome.error is None and not piece.last:
                held.data_done = piece.stop
                continue
            else:
                self._finish(held, outcome)
            done.append(held)
        return done

    async def step(self, runs: Sequence[HeldRun]) -> None:
        """Optimizer steps of several runs."""
        steps = {held.name: _as(OptimStep, held.head).adam for held in runs}
        outcomes = await self._engine.call(self._engine.engine.optim_step, steps)
        for held in runs:
            outcome = outcomes[held.name]
            while isinstance(outcome.error, NoRoom) and await self._places.make_room(held):
                step = {held.name: steps[held.name]}
                outcome = (await self._engine.call(self._engine.engine.optim_step, step))[held.name]
            self._finish(held, outcome)

    async def _alone(self, held: HeldRun, outcome: PassOutcome) -> PassOutcome:
        """Do an operation for which memory ran out again, undivided and by itself, after others have left the device.

        At once, since with the next pass the others would be back.
        """
        operation = _as(ForwardBackward, held.head)
        item = PassItem(operation.run, operation.data, operation.loss, operation.forward_only)
        while isinstance(outcome.error, NoRoom) and await self._places.make_room(held):
            (outcome,) = await self._engine.call(self._engine.engine.forward_backward, [item])
        return outcome

    def _finish(self, held: HeldRun, outcome: PassOutcome | StepOutcome) -> None:
        """Answer a run's head with what came of it."""
        if outcome.error is not None:
            self.refuse(held.head, outcome.error, again=held.may_be_answered)
            return
        logprobs = list(outcome.logprobs) if isinstance(outcome, PassOutcome) else []
        self._answer(held, result_of(held.head.message, metrics=dict(outcome.metrics), logprobs=logprobs))

    async def single(self, held: HeldRun) -> None:
        """Any other operation that does not go aside. Raise `TemporaryError` if it is to be tried again."""
        operation = held.head.message
        try:
            if isinstance(operation, Refused):
                self._send_refused(held.head)
            elif isinstance(operation, CreateRun):
                self._check_base(operation)
                await self._places.create(held, operation.lora)
                self._answer(held, result_of(operation))
            else:
                raise PermanentError(f"{type(operation).__name__} is not done by itself")
        except TemporaryError:
            raise
        except MeshError as error:
            self.refuse(held.head, error, again=held.may_be_answered)

    async def aside(self, held: HeldRun) -> None:
        """An operation that `goes_aside`. Raise `TemporaryError` if it is to be tried again."""
        delivery = held.head
        request = delivery.message.request_id
        if held.may_be_answered and await self._node.bus.answer_of(request) is not None:
            return
        try:
            result = await self._on_files(delivery.message, held)
        except TemporaryError:
            raise
        except MeshError as error:
            self.refuse(delivery, error)
            await self._answers.settled(held.name)  # it stays refused, whoever replays what comes after it
        else:
            self._answer(held, result)

    async def _on_files(self, operation: AnyOperation, held: HeldRun) -> OperationResult:
        if isinstance(operation, SavePolicy):
            return await self._saves.policy(operation, held)
        if isinstance(operation, SaveState):
            return await self._saves.state(operation, held)
        if isinstance(operation, SaveExternal):
            return await self._saves.external(operation, held)
        assert isinstance(operation, (CreateRun, LoadState))
        if isinstance(operation, CreateRun):
            self._check_base(operation)
        assert operation.source is not None
        await self._loads.load(held, operation.source, optimizer=operation.optimizer)
        return result_of(operation)

    async def repeated(self, delivery: Delivery[AnyOperation]) -> None:
        """Answer an operation that was done before: what it gave, as far as that was written down."""
        operation = delivery.message
        if await self._node.bus.answer_of(operation.request_id) is not None:
            return
        if isinstance(operation, Refused):
            self._send_refused(delivery)
            return
        result = await self._saves.told_before(operation) or result_of(operation)
        self._answers.send(delivery, result)

    def refuse(self, delivery: Delivery[AnyOperation], error: MeshError, *, again: bool = False) -> None:
        """Answer with why it was not done; `again`: unless it was answered before."""
        operation = delivery.message
        self._metrics.operations.labels(_kind(operation), "failed").inc()
        failed = RequestFailed(request_id=operation.request_id, failure=failure_of(error))
        self._answers.send(delivery, failed, again=again)

    def _send_refused(self, delivery: Delivery[AnyOperation]) -> None:
        operation = delivery.message
        assert isinstance(operation, Refused)
        self._metrics.operations.labels(_kind(operation), "failed").inc()
        self._answers.send(delivery, RequestFailed(request_id=operation.request_id, failure=operation.failure))

    def _check_base(self, operation: CreateRun) -> None:
        if operation.base_model != self._engine.engine.base_model:
            raise UserError(
                f"run {operation.run}: base_model {operation.base_model!r} is not "
                f"{self._engine.engine.base_model!r}, for which the run was placed"
            )

    def _answer(self, held: HeldRun, result: OperationResult) -> None:
        delivery, record = held.head, held.record
        self._metrics.operations.labels(_kind(delivery.message), "done").inc()
        tokens = tokens_of(delivery.message)

        def told() -> None:
            self._usage.count("training", tokens, owner=record.owner, session=record.session)

        self._answers.send(delivery, result, again=held.may_be_answered, told=told)


OperationT = TypeVar("OperationT", ForwardBackward, OptimStep)


def _as(kind: type[OperationT], delivery: Delivery[AnyOperation]) -> OperationT:
    operation = delivery.message
    assert isinstance(operation, kind)
    return operation


def _item(operation: ForwardBackward, piece: Piece) -> PassItem:
    data = operation.data
    return PassItem(
        operation.run,
        data[piece.first : piece.stop],
        operation.loss,
        operation.forward_only,
        first=piece.first == 0,
        rest=data[piece.stop :],
    )


def _kind(operation: AnyOperation) -> str:
    return type(operation).__name__
