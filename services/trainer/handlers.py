"""Operations in, results out.

An operation that changes only memory (a pass, a step) is done once and its answer sent until it is stored; it is
durable by the log. One that writes (a policy, a checkpoint) can be done again without harm, and is, after a temporary
error.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import TypeVar

from services.trainer.answers import Answers
from services.trainer.engine_thread import EngineThread
from services.trainer.engines.base import NoRoom, PassItem, PassOutcome, StepOutcome
from services.trainer.fair import Piece
from services.trainer.held import HeldRun
from services.trainer.metrics import TrainerMetrics
from services.trainer.places import Places
from shared import topology
from shared.bus import Delivery
from shared.contracts.policies import PolicyPublished, PolicyRecord, PolicyRef
from shared.contracts.results import RequestFailed
from shared.contracts.training import (
    AnyOperation,
    CreateRun,
    ForwardBackward,
    OperationResult,
    OptimStep,
    SavePolicy,
    SaveState,
)
from shared.errors import MeshError, PermanentError, TemporaryError, UserError, failure_of
from shared.node import Node


class Operations:
    """Executes operations on the engine and answers them."""

    def __init__(
        self, node: Node, engine: EngineThread, metrics: TrainerMetrics, places: Places, answers: Answers
    ) -> None:
        self._node = node
        self._answers = answers
        self._engine = engine
        self._metrics = metrics
        self._places = places
        self._policies = node.bus.table(topology.POLICIES)

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
            self.refuse(held.head, outcome.error)
            return
        logprobs = list(outcome.logprobs) if isinstance(outcome, PassOutcome) else []
        self._answer(held.head, _result(held.head.message, metrics=dict(outcome.metrics), logprobs=logprobs))

    async def single(self, held: HeldRun) -> None:
        """Any other operation. Raise `TemporaryError` if it is to be tried again."""
        delivery = held.head
        operation = delivery.message
        try:
            if isinstance(operation, CreateRun):
                await self._create(operation, held)
                self._answer(delivery, _result(operation))
            elif isinstance(operation, SavePolicy):
                self._answer(delivery, _result(operation, policy=await self._save_policy(operation, held)))
            elif isinstance(operation, SaveState):
                self._answer(delivery, await self._save_state(operation))
            else:
                raise PermanentError(f"{type(operation).__name__} is not done by itself")
        except TemporaryError:
            raise
        except MeshError as error:
            self.refuse(delivery, error)

    async def repeated(self, delivery: Delivery[AnyOperation]) -> None:
        """Answer an operation that was done before: what it gave, as far as that was written down."""
        operation = delivery.message
        if await self._node.bus.answer_of(operation.request_id) is not None:
            return
        policy = None
        if isinstance(operation, SavePolicy):
            entry = await self._policies.get((operation.run, str(operation.version)))
            policy = entry.value if entry else None
        self._answer(delivery, _result(operation, policy=policy))

    def refuse(self, delivery: Delivery[AnyOperation], error: MeshError) -> None:
        """Answer with why it was not done."""
        operation = delivery.message
        self._metrics.operations.labels(_kind(operation), "failed").inc()
        self._answers.send(delivery, RequestFailed(request_id=operation.request_id, failure=failure_of(error)))

    async def _create(self, operation: CreateRun, held: HeldRun) -> None:
        if operation.base_model != self._engine.engine.base_model:
            raise UserError(
                f"run {operation.run}: base_model {operation.base_model!r} is not "
                f"{self._engine.engine.base_model!r}, for which the run was placed"
            )
        await self._places.create(held, operation.lora)

    async def _save_policy(self, operation: SavePolicy, held: HeldRun) -> PolicyRecord | None:
        key = (operation.run, str(operation.version))
        ref = PolicyRef(run=operation.run, version=operation.version)
        if (entry := await self._policies.get(key)) is not None:
            record = entry.value  # done before the trainer was killed: a policy is written once
        elif await self._policies.was_deleted(key):
            return None  # done, and not needed any more: a replay does not bring it back
        else:
            record = await self._write_policy(ref, held)
            if await self._policies.create(key, record) is None:
                raise TemporaryError(f"policy {ref} was recorded by another trainer meanwhile")
        await self._node.bus.publish(
            topology.POLICIES_PUBLISHED,
            PolicyPublished(record=record, seq=operation.seq),
            msg_id=f"policy/{ref}",
            run=operation.run,
        )
        return record

    async def _write_policy(self, ref: PolicyRef, held: HeldRun) -> PolicyRecord:
        files = await self._engine.call(self._engine.engine.export_adapter, ref.run)
        weights = files["adapter_model.safetensors"]
        # The content is in the name: a replay that ends in another last bit does not collide with an earlier write.
        digest = hashlib.sha256(weights).hexdigest()[:12]
        folder = f"policies/{topology.token(ref.run)}/{ref.version}-{digest}"
        config_ref, weights_ref = await asyncio.gather(
            self._node.blobs.put(f"{folder}/adapter_config.json", files["adapter_config.json"]),
            self._node.blobs.put(f"{folder}/adapter_model.safetensors", weights),
        )
        return PolicyRecord(
            policy=ref,
            base_model=held.record.base_model,
            lora=held.record.lora,
            config=config_ref,
            weights=weights_ref,
            owner=held.record.owner,
        )

    async def _save_state(self, operation: SaveState) -> OperationResult:
        state = await self._engine.call(self._engine.engine.snapshot, operation.run)
        digest = hashlib.sha256(state).hexdigest()[:12]
        key = f"checkpoints/{topology.token(operation.run)}/{topology.token(operation.name)}-{digest}.safetensors"
        ref = await self._node.blobs.put(key, state)
        return OperationResult(request_id=operation.request_id, run=operation.run, seq=operation.seq, checkpoint=ref)

    def _answer(self, delivery: Delivery[AnyOperation], result: OperationResult) -> None:
        self._metrics.operations.labels(_kind(delivery.message), "done").inc()
        self._answers.send(delivery, result)


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


def _result(operation: AnyOperation, **filled: object) -> OperationResult:
    names = {"request_id": operation.request_id, "run": operation.run, "seq": operation.seq, "note": operation.note}
    return OperationResult(**names, **filled)  # type: ignore[arg-type]
