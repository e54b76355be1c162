"""Wiring of a sampler.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| requests | `rl.v1.sample.<pool>`, shared by the pool's replicas | a free request slot | an answered request |
| a request | - | its policy to be loaded | the blob store; a place among the policies |
| abandonments | `rl.v1.abandoned.>`, not stored | nothing | an asker that gives up |
| announcements | `rl.v1.events.policy.*` from now on | nothing | a published policy |
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from services.sampler.abandoned import Abandoned
from services.sampler.config import SamplerConfig
from services.sampler.engines.base import SamplerEngine
from services.sampler.files import PolicyFiles
from services.sampler.handlers import SampleHandler
from services.sampler.metrics import SamplerMetrics
from services.sampler.policies import Policies
from shared import topology
from shared.errors import MeshError, PermanentError
from shared.model_offers import model_offers
from shared.node import Node
from shared.worker import Worker

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0


class SamplerService:
    """One replica of a pool."""

    def __init__(
        self, config: SamplerConfig, node: Node, make_engine: Callable[[SamplerConfig], SamplerEngine]
    ) -> None:
        self.base_model: str | None = config.base_model
        self.offers: Sequence[str] = model_offers(Path(config.model_dir))
        self._node = node
        self._engine = make_engine(config)
        self._metrics = SamplerMetrics(node.telemetry.registry, self._engine)
        files = PolicyFiles(node.bus, config.base_model)
        self._policies = Policies(self._engine, files.fetch, node.tasks, self._metrics.policy_seconds)
        self._abandoned = Abandoned()
        self._worker = Worker(
            node.bus,
            topology.sampler_consumer(config.base_model),
            SampleHandler(node.bus, self._engine, self._policies, self._abandoned, self._metrics),
            concurrency=config.max_requests,
            metrics=node.worker_metrics,
        )

    def activity(self) -> str:
        """See `Service.activity`."""
        load = self._engine.load()
        if not load.running and not load.waiting:
            return "idle"
        return f"generating {load.running} sequences, {load.waiting} waiting"

    async def start(self) -> None:
        """Load the model, then take requests."""
        await self._engine.start()
        await self._node.bus.hear_abandoned(self._abandoned.hear)
        place = await self._node.bus.last_place(topology.POLICIES_PUBLISHED)
        self._node.tasks.start("announcements", self._follow_announcements(place))
        self._node.tasks.start("requests", self._worker.run())
        self._node.tasks.start("engine", self._watch_engine())

    async def stop(self) -> None:
        """Finish what runs, hand back the rest."""
        await self._worker.stop(self._node.drain_seconds)
        await self._engine.stop()

    async def _watch_engine(self) -> None:
        """Fail when the engine has: a replica that can only refuse must not take from the shared queue."""
        while True:
            if (problem := self._engine.problem()) is not None:
                raise PermanentError(problem)
            await asyncio.sleep(WATCH_SECONDS)

    async def _follow_announcements(self, place: int) -> None:
        async for delivery in self._node.bus.follow(topology.POLICIES_PUBLISHED, after=place):
            record = delivery.message.record
            if record.base_model != self.base_model:
                continue
            try:
                await self._policies.prefetch(record.policy)
            except MeshError as error:
                # Only a head start: whoever asks for it is told what is wrong.
                log.warning(
                    "policy %s could not be loaded ahead: %s",
                    record.policy,
                    error,
                    extra={"run": record.policy.run, "policy": record.policy},
                )
