"""Commands about jobs in, answers out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from services.coordinator import validation
from services.coordinator.metrics import CoordinatorMetrics
from shared import topology
from shared.bus import Bus, Delivery
from shared.contracts.checks import CheckAnswer, CheckEnvironment
from shared.contracts.jobs import (
    FINISHED,
    ControlJob,
    FieldError,
    JobAnswer,
    JobPhase,
    JobRecord,
    JobSpec,
    Submission,
    SubmitJob,
    Wanted,
)
from shared.errors import PermanentError, TemporaryError, UserError

CHECK_SECONDS = 20.0
"""For an environment or a reward to say whether it works with a job's parameters. Less than clients wait for."""
ENDED: Mapping[JobPhase, str] = {"succeeded": "has succeeded", "failed": "has failed", "cancelled": "was cancelled"}


class Submissions:
    """Takes jobs in. A submission that is delivered twice, or repeated with its request id, makes one job."""

    def __init__(self, bus: Bus, metrics: CoordinatorMetrics) -> None:
        self._bus = bus
        self._metrics = metrics
        self._jobs = bus.table(topology.JOB_RECORDS)
        self._granted = bus.table(topology.SUBMISSIONS)
        self._replicas = bus.table(topology.REPLICAS)

    async def __call__(self, delivery: Delivery[SubmitJob]) -> None:
        """Check a job, write it down, answer."""
        request = delivery.message.request_id
        check_request_id(request)
        draft = validation.read(delivery.message.spec)
        job = await self._granted_before(delivery)
        if job is None:
            if errors := await self._errors(draft):
                await self._refuse(delivery, errors)
                return
            assert draft.spec is not None
            job = await self._grant(draft.spec, delivery)
        await answer(self._bus, delivery, JobAnswer(request_id=request or "", job=job))

    async def _granted_before(self, delivery: Delivery[SubmitJob]) -> str | None:
        """The job that the same request got when it came before."""
        request = delivery.message.request_id
        earlier = None if request is None else await self._granted.get(request)
        # With our own place it is this message that comes again: whoever had it may have died before the job was made.
        return earlier.value.job if earlier is not None and earlier.value.seq != delivery.seq else None

    async def _refuse(self, delivery: Delivery[SubmitJob], errors: list[FieldError]) -> None:
        self._metrics.submitted.labels("refused").inc()
        if delivery.message.request_id is None:  # nobody to tell: keep it with its reason
            raise UserError("; ".join(f"{error.path}: {error.message}" for error in errors))
        await answer(self._bus, delivery, JobAnswer(request_id=delivery.message.request_id, errors=errors))

    async def _grant(self, spec: JobSpec, delivery: Delivery[SubmitJob]) -> str:
        # The place in the stream makes the id: the same submission gives the same id, however often it is delivered.
        job, request = f"{spec.name}-{delivery.seq}", delivery.message.request_id
        if request is not None:
            created = await self._granted.create(request, Submission(job=job, seq=delivery.seq))
            if created is None and (earlier := await self._granted_before(delivery)) is not None:
                return earlier  # the same request, handled at the same time
        record = JobRecord(job=job, spec=spec, owner=delivery.message.owner, run=job, created=time.time())
        if await self._jobs.create(job, record) is not None:
            self._metrics.submitted.labels("accepted").inc()
        return job

    async def _errors(self, draft: validation.Draft) -> list[FieldError]:
        errors = validation.check(draft, [entry.value for entry in await self._replicas.items()])
        asked = [self._answer_to(question) for question in validation.questions(draft, errors, self._bus.new_request)]
        answers = await asyncio.gather(*asked)
        return validation.merged([*errors, *(error for found in answers for error in found)])

    async def _answer_to(self, question: validation.Question) -> list[FieldError]:
        """What an environment or a reward says of its part of a job."""
        is_environment = isinstance(question, CheckEnvironment)
        channel: topology.Channel[Any] = topology.ENVIRONMENT_CHECKS if is_environment else topology.REWARD_CHECKS
        kind = "environment" if is_environment else "reward"
        try:
            found = await self._bus.ask(channel, question, timeout=CHECK_SECONDS)
        except TemporaryError:
            message = (
                f"the {kind} service did not say in {CHECK_SECONDS:g} s whether {question.name!r} works with these "
                "parameters: it is away, or busy loading (see `openrl status`); submit the job again"
            )
            return [FieldError(path=question.path, message=message)]
        except PermanentError as error:
            return [FieldError(path=question.path, message=str(error))]
        assert isinstance(found, CheckAnswer)
        return found.errors


class Controls:
    """Takes in what an owner wants of a job."""

    def __init__(self, bus: Bus, wanted: Wanted) -> None:
        self._bus = bus
        self._wanted: Wanted = wanted
        self._jobs = bus.table(topology.JOB_RECORDS)

    async def __call__(self, delivery: Delivery[ControlJob]) -> None:
        """Write the wish into the job's record; whoever drives it follows."""
        command = delivery.message
        check_request_id(command.request_id)
        while True:
            entry = await self._jobs.get(command.job)
            if entry is None:
                raise UserError(f"there is no job {command.job!r}: `openrl jobs` lists them")
            if entry.value.phase in FINISHED:
                raise UserError(f"job {command.job} {ENDED[entry.value.phase]} already: nothing is left to change")
            record = msgspec.structs.replace(entry.value, wanted=self._wanted)
            if await self._jobs.update(command.job, record, entry.revision) is not None:
                break
        await answer(self._bus, delivery, JobAnswer(request_id=command.request_id or "", job=command.job))


async def answer(bus: Bus, delivery: Delivery[Any], message: JobAnswer) -> None:
    """Answer a command, if its sender wants to hear. Each command gets its own answer, also one that is repeated."""
    if message.request_id:
        await bus.answer(message, json=True, msg_id=f"answer/{message.request_id}/{delivery.seq}")


def check_request_id(request: str | None) -> None:
    """Raise `UserError` for an id that does not stand in the answer's subject as it is."""
    if request is not None and not topology.is_plain_request(request):
        raise UserError(
            f"request_id {request!r} cannot end the subject of an answer, rl.v1.results.<request_id>: use letters, "
            f"digits, '-' and '_', with single dots between, up to {topology.MAX_NAME} characters"
        )
