"""A sample request in, its answer out."""

from __future__ import annotations

from services.sampler.engines.base import SamplerEngine
from services.sampler.metrics import SamplerMetrics
from services.sampler.policies import Policies
from shared.bus import Bus, Delivery
from shared.contracts.sampling import SampleRequest, SampleResult


class SampleHandler:
    """Answers sample requests. Doing one twice gives the same answer, or one that is dropped."""

    def __init__(self, bus: Bus, engine: SamplerEngine, policies: Policies, metrics: SamplerMetrics) -> None:
        self._bus = bus
        self._engine = engine
        self._policies = policies
        self._metrics = metrics

    async def __call__(self, delivery: Delivery[SampleRequest]) -> None:
        """Generate and answer."""
        request = delivery.message
        async with self._policies.using(request.policy):
            self._engine.check(request)
            result = await self._engine.generate(request)
        self._count(request, result)
        await self._bus.answer(result, json=delivery.json)

    def _count(self, request: SampleRequest, result: SampleResult) -> None:
        self._metrics.queue_seconds.observe(result.queue_seconds)
        self._metrics.tokens.labels("prompt").inc(len(request.prompt))
        self._metrics.tokens.labels("sampled").inc(sum(len(sequence.tokens) for sequence in result.sequences))
