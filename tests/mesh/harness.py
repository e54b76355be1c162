"""Starts real services inside the test's own loop, on a real nats-server, with a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from services.coordinator.config import CoordinatorConfig
from services.coordinator.service import CoordinatorService
from services.gateway.config import GatewayConfig
from services.gateway.service import GatewayService
from services.sampler.config import SamplerConfig
from services.sampler.engines.factory import make_engine as make_sampler_engine
from services.sampler.service import SamplerService
from services.trainer.config import TrainerConfig
from services.trainer.engines.factory import make_engine as make_trainer_engine
from services.trainer.service import TrainerService
from shared.node import Node
from shared.process import running

T = TypeVar("T")

MODEL = "tiny/Llama-0.1"
"""A name with everything in it that a subject token must not hold."""


class Place:
    """Where a test's mesh lives: a server, a blob directory, a model."""

    def __init__(self, nats_url: str, directory: Path, model_dir: Path) -> None:
        self.directory = directory
        self.model_dir = model_dir
        self.common: dict[str, Any] = {
            "nats_url": nats_url,
            "blob_url": str(directory / "blobs"),
            "drain_seconds": 2.0,
        }

    @contextlib.asynccontextmanager
    async def trainer(self, **settings: Any) -> AsyncIterator[tuple[TrainerService, Node]]:
        config = TrainerConfig(**{**self._engine("trainer"), **settings})
        async with running("trainer", config, lambda c, n: TrainerService(c, n, make_trainer_engine)) as (
            service,
            node,
        ):
            assert isinstance(service, TrainerService)
            yield service, node

    @contextlib.asynccontextmanager
    async def sampler(self, **settings: Any) -> AsyncIterator[tuple[SamplerService, Node]]:
        config = SamplerConfig(**{**self._engine("sampler"), **settings})
        async with running("sampler", config, lambda c, n: SamplerService(c, n, make_sampler_engine)) as (
            service,
            node,
        ):
            assert isinstance(service, SamplerService)
            yield service, node

    @contextlib.asynccontextmanager
    async def coordinator(self, **settings: Any) -> AsyncIterator[tuple[CoordinatorService, Node]]:
        config = CoordinatorConfig(
            **{**self.common, "replica": "coordinator-1", "metrics_dir": str(self.directory / "jobs"), **settings}
        )
        async with running("coordinator", config, CoordinatorService) as (service, node):
            assert isinstance(service, CoordinatorService)
            yield service, node

    @contextlib.asynccontextmanager
    async def gateway(self, **settings: Any) -> AsyncIterator[GatewayService]:
        """A gateway on a free port of the loopback."""
        config = GatewayConfig(**{**self.common, "replica": "gateway-1", "port": 0, **settings})
        async with running("gateway", config, GatewayService) as (service, _):
            assert isinstance(service, GatewayService)
            yield service

    def _engine(self, service: str) -> dict[str, Any]:
        return {
            **self.common,
            "replica": f"{service}-1",
            "base_model": MODEL,
            "model_dir": str(self.model_dir),
            "device": "cpu",
            "threads": 1,
        }


async def eventually(look: Callable[[], Awaitable[T | None]], seconds: float = 30.0) -> T:
    """What `look` finds, as soon as it finds something."""
    async with asyncio.timeout(seconds):
        while True:
            found = await look()
            if found is not None:
                return found
            await asyncio.sleep(0.02)
