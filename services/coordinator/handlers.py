"""Commands about jobs in, answers out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.validation import check
from shared import topology
from shared.bus import Bus, Delivery
from shared.contracts.jobs import FINISHED, ControlJob, JobAnswer, JobRecord, JobSpec, SubmitJob, Wanted
from shared.contracts.replicas import ReplicaRecord
from shared.errors import UserError


class Submissions:
    """Takes jobs in. A submission that is delivered twice makes one job."""

    def __init__(self, bus: Bus, metrics: CoordinatorMetrics) -> None:
        self._bus = bus
        self._metrics = metrics
        self._jobs = bus.table(topology.JOB_RECORDS)
        self._replicas = bus.table(topology.REPLICAS)

    async def __call__(self, delivery: Delivery[SubmitJob]) -> None:
        """Check a job, write it down, answer."""
        spec, errors = check(delivery.message.spec, await self._living())
        if spec is None:
            self._metrics.submitted.labels("refused").inc()
            if delivery.message.request_id is None:  # nobody to tell: keep it with its reason
                raise UserError("; ".join(f"{error.path}: {error.message}" for error in errors))
            await self._bus.answer(JobAnswer(request_id=delivery.message.request_id, errors=errors), json=True)
            return
        job = await self._write_down(spec, delivery)
        self._metrics.submitted.labels("accepted").inc()
        if delivery.message.request_id is not None:
            await self._bus.answer(JobAnswer(request_id=delivery.message.request_id, job=job), json=True)

    async def _write_down(self, spec: JobSpec, delivery: Delivery[SubmitJob]) -> str:
        # The place in the stream makes the id: the same submission gives the same id, however often it is delivered.
        job = f"{spec.name}-{delivery.seq}"
        record = JobRecord(job=job, spec=spec, owner=delivery.message.owner, run=job, created=time.time())
        await self._jobs.create(job, record)
        return job

    async def _living(self) -> Sequence[ReplicaRecord]:
        return [entry.value for entry in await self._replicas.items()]


class Controls:
    """Takes in what an owner wants of a job."""

    def __init__(self, bus: Bus, wanted: Wanted) -> None:
        self._bus = bus
        self._wanted: Wanted = wanted
        self._jobs = bus.table(topology.JOB_RECORDS)

    async def __call__(self, delivery: Delivery[ControlJob]) -> None:
        """Write the wish into the job's record; whoever drives it follows."""
        command = delivery.message
        while True:
            entry = await self._jobs.get(command.job)
            if entry is None:
                raise UserError(f"there is no job {command.job!r}: `openrl jobs` lists them")
            if entry.value.phase in FINISHED:
                raise UserError(f"job {command.job} has already {entry.value.phase}: nothing is left to change")
            record = msgspec.structs.replace(entry.value, wanted=self._wanted)
            if await self._jobs.update(command.job, record, entry.revision) is not None:
                break
        if command.request_id is not None:
            await self._bus.answer(JobAnswer(request_id=command.request_id, job=command.job), json=True)
