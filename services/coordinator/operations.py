"""The operations of one step of a job. Pure: the same plan gives the same operations, so they can be sent again."""

from __future__ import annotations

from collections.abc import Sequence

from shared.contracts.jobs import JobRecord
from shared.contracts.training import (
    AdamParams,
    AnyOperation,
    CreateRun,
    Datum,
    ForwardBackward,
    LossSpec,
    OptimStep,
    SavePolicy,
    SaveState,
)


def request_of(job: str, seq: int) -> str:
    """Request id of an operation: the same for every try, so that an answer which came before is found."""
    return f"job-{job}.{seq}"


def create_run(record: JobRecord) -> CreateRun:
    """The first operation of a job's run."""
    return CreateRun(
        run=record.run,
        seq=0,
        request_id=request_of(record.job, 0),
        owner=record.owner,
        base_model=record.spec.base_model,
        lora=record.spec.lora,
    )


def step_operations(record: JobRecord, first_seq: int, data: Sequence[Datum], loss: LossSpec) -> list[AnyOperation]:
    """Train on `data` with `loss`, if there is any, publish the policy, write the checkpoints that are due.

    The first step begins the run; the last one leaves a policy and a checkpoint in any case.
    """
    last = record.step + 1 == record.spec.algorithm.steps
    every = record.spec.checkpoint.every
    operations: list[AnyOperation] = [] if first_seq else [create_run(record)]

    def head() -> dict[str, object]:
        seq = first_seq + len(operations)
        return {"run": record.run, "seq": seq, "request_id": request_of(record.job, seq), "owner": record.owner}

    if data:
        operations.append(ForwardBackward(**head(), data=list(data), loss=loss))  # type: ignore[arg-type]
        operations.append(OptimStep(**head(), adam=_adam(record)))  # type: ignore[arg-type]
    if data or (last and record.policy is None):
        operations.append(SavePolicy(**head(), version=record.updates + bool(data)))  # type: ignore[arg-type]
    if last or (every and (record.step + 1) % every == 0):
        name = "final" if last else f"step-{record.step + 1}"
        operations.append(SaveState(**head(), name=name))  # type: ignore[arg-type]
    return operations


def _adam(record: JobRecord) -> AdamParams:
    algorithm = record.spec.algorithm
    return AdamParams(
        learning_rate=algorithm.learning_rate,
        beta1=algorithm.beta1,
        beta2=algorithm.beta2,
        eps=algorithm.eps,
        weight_decay=algorithm.weight_decay,
        grad_clip_norm=algorithm.grad_clip_norm,
    )
