"""A sample request in, its answer out."""

from __future__ import annotations

import asyncio

import msgspec

from services.sampler.abandoned import Abandoned
from services.sampler.engines.base import SamplerEngine
from services.sampler.metrics import SamplerMetrics
from services.sampler.policies import Policies
from shared import topology
from shared.bus import Bus, Delivery
from shared.contracts.results import RequestFailed
from shared.contracts.sampling import SampleRequest, SampleResult
from shared.errors import UserError, failure_of
from shared.usage import Usage


class SampleHandler:
    """Answers sample requests. Doing one twice gives the same answer, or one that is dropped."""

    def __init__(
        self,
        bus: Bus,
        engine: SamplerEngine,
        policies: Policies,
        abandoned: Abandoned,
        metrics: SamplerMetrics,
        usage: Usage,
    ) -> None:
        self._bus = bus
        self._usage = usage
        self._engine = engine
        self._policies = policies
        self._abandoned = abandoned
        self._metrics = metrics

    async def __call__(self, delivery: Delivery[SampleRequest]) -> None:
        """Generate and answer, unless whoever asked gives up before."""
        request = _owned(delivery)
        result = await self._unless_abandoned(request)
        if result is None:
            self._metrics.abandoned.inc()
            gone = failure_of(UserError(f"request {request.request_id} was abandoned by whoever asked"))
            await self._bus.answer(RequestFailed(request_id=request.request_id, failure=gone), json=delivery.json)
            return
        await self._bus.answer(result, json=delivery.json)
        self._count(request, result)

    async def _unless_abandoned(self, request: SampleRequest) -> SampleResult | None:
        work = asyncio.ensure_future(self._result(request))
        with self._abandoned.cancelling(request.request_id, work):
            try:
                return await work
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if request.request_id not in self._abandoned or (task is not None and task.cancelling()):
                    raise  # this replica stops: the request is handed back
                return None

    async def _result(self, request: SampleRequest) -> SampleResult:
        with self._metrics.request():
            async with self._policies.using(request.policy):
                self._engine.check(request)
                with self._metrics.busy:
                    return await self._engine.generate(request)

    def _count(self, request: SampleRequest, result: SampleResult) -> None:
        self._metrics.queue_seconds.observe(result.queue_seconds)
        sampled = [len(sequence.tokens) for sequence in result.sequences]
        self._metrics.answered(request.owner, prompt=len(request.prompt), sampled=sampled)
        self._usage.count("prompt", len(request.prompt), owner=request.owner, session=request.session)
        self._usage.count("sampled", sum(sampled), owner=request.owner, session=request.session)


def _owned(delivery: Delivery[SampleRequest]) -> SampleRequest:
    """The request, of the owner in its subject, where there is one: a server can see to it that this one is true."""
    owner = topology.sample_owner(delivery.subject)
    return delivery.message if owner is None else msgspec.structs.replace(delivery.message, owner=owner)
