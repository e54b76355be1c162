"""The environment service: plays groups of episodes.

| loop    | consumes                          | waits for                              | unblocked by               |
|---------|-----------------------------------|----------------------------------------|----------------------------|
| worker  | `PlayGroup` of all environments   | a free one of `concurrency` groups     | a group that ends          |
| group   | one `PlayGroup`                   | tokenizer, task, first replies of all  | a thread; the samplers     |
| episode | replies to its own prompts        | the environment's step; the next reply | a thread; the samplers     |
| checks  | `CheckEnvironment`                | making the environment; its first task | a thread; its time limit   |
| maker   | first use of a model, environment | loading it, in a thread                | the thread; its time limit |
| jobs    | phases in the bucket `jobs`       | nothing                                | any job's change           |

Produces `ScoreGroup` for the reward service, or at once a `GroupScored` with the failure of a group, and answers to
checks. Keeps nothing
between groups but what can be made again: tokenizers and environments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.environment.calls import Calls
from services.environment.checks import Checks
from services.environment.config import EnvironmentConfig
from services.environment.handlers import GroupHandler, Tables
from services.environment.metrics import EnvironmentMetrics
from services.environment.player import Player
from services.environment.pool import BusPool
from services.environment.registry import Registry
from shared import topology
from shared.contracts.checks import CheckEnvironment
from shared.contracts.episodes import PlayGroup
from shared.errors import UserError
from shared.finished import FinishedJobs
from shared.node import Node
from shared.worker import Worker

CONCURRENT_CHECKS = 8
LOADING_SECONDS = 120.0
"""For importing all plugins at the start."""


class EnvironmentService:
    """See the module's docstring."""

    base_model: str | None = None

    def __init__(self, config: EnvironmentConfig, node: Node) -> None:
        self._config = config
        self._node = node
        self._metrics = EnvironmentMetrics(node.telemetry.registry)
        self._calls = Calls(max_stuck=config.max_stuck, stuck=self._metrics.stuck)
        self._offers: list[str] = []
        self._worker: Worker[PlayGroup] | None = None
        self._checker: Worker[CheckEnvironment] | None = None

    @property
    def offers(self) -> Sequence[str]:
        """Environments that can be named in a job, as `environment:NAME`."""
        return self._offers

    def activity(self) -> str:
        """See `Service.activity`."""
        groups = self._worker.running if self._worker else 0
        return f"playing {groups} group{'' if groups == 1 else 's'}" if groups else "idle"

    async def start(self) -> None:
        """Load the environments and begin to take groups."""
        registry = await self._load()
        self._offers = [f"environment:{name}" for name in registry.names]
        node = self._node
        tables = Tables(registry, self._calls, self._config.models, node.tasks)
        finished = FinishedJobs(node.bus)
        await finished.start(node.tasks)
        player = Player(BusPool(node.bus, self._config.sample_timeout_s), self._calls, finished, self._metrics)
        handler = GroupHandler(node.bus, tables, player, finished, self._metrics)
        self._worker = Worker(
            node.bus,
            topology.GROUP_PLAYERS,
            handler.handle,
            concurrency=self._config.concurrency,
            metrics=node.worker_metrics,
            on_too_often=handler.too_often,
        )
        self._checker = Worker(
            node.bus,
            topology.ENVIRONMENT_CHECKERS,
            Checks(node.bus, registry, self._calls, node.tasks).handle,
            concurrency=CONCURRENT_CHECKS,
            metrics=node.worker_metrics,
        )
        node.tasks.start("groups", self._worker.run())
        node.tasks.start("checks", self._checker.run())

    async def stop(self) -> None:
        """See `Service.stop`."""
        workers = [worker for worker in (self._worker, self._checker) if worker]
        await asyncio.gather(*(worker.stop(self._node.drain_seconds) for worker in workers))

    async def _load(self) -> Registry:
        try:
            async with asyncio.timeout(LOADING_SECONDS):
                return await self._calls.run("plugins", "loading", Registry.load, self._config.plugins)
        except TimeoutError:
            raise UserError(
                f"the environments were not loaded in {LOADING_SECONDS:.0f} s: look for a plugin that hangs on import"
            ) from None


def build(config: EnvironmentConfig, node: Node) -> EnvironmentService:
    """What `shared.process` calls."""
    return EnvironmentService(config, node)
