"""The reward service: scores groups of played episodes.

| loop    | consumes                    | waits for                          | unblocked by                        |
|---------|-----------------------------|------------------------------------|-------------------------------------|
| worker  | `ScoreGroup` of all rewards | a free one of `concurrency` groups | a group that is scored              |
| group   | one `ScoreGroup`            | a free one of `processes`          | the end of a score; its `timeout_s` |
| checks  | `CheckReward`               | a free one of `processes`          | the end of the check; 15 s          |
| process | one episode                 | the reward's own code              | its return; its end by the service  |
| jobs    | phases in the bucket `jobs` | nothing                            | any job's change                    |

Produces `GroupScored`, and answers to checks. Keeps nothing between groups.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from services.reward.checks import Checks
from services.reward.config import RewardConfig
from services.reward.handlers import ScoreHandler
from services.reward.metrics import RewardMetrics
from services.reward.processes import Processes
from shared import topology
from shared.finished import FinishedJobs
from shared.node import Node
from shared.worker import Worker

log = logging.getLogger(__name__)


class RewardService:
    """See the module's docstring."""

    base_model: str | None = None

    def __init__(self, config: RewardConfig, node: Node) -> None:
        self._node = node
        metrics = RewardMetrics(node.telemetry.registry)
        self._processes = Processes(config.processes, config.plugins, config.memory_mib, metrics.ended)
        self._finished = FinishedJobs(node.bus)
        handler = ScoreHandler(node.bus, self._processes, self._finished, metrics)
        self._worker = Worker(
            node.bus,
            topology.GROUP_SCORERS,
            handler.handle,
            concurrency=config.concurrency,
            metrics=node.worker_metrics,
            on_too_often=handler.too_often,
        )
        self._checker = Worker(
            node.bus,
            topology.REWARD_CHECKERS,
            Checks(node.bus, self._processes).handle,
            concurrency=config.processes,
            metrics=node.worker_metrics,
        )
        self._offers: list[str] = []

    @property
    def offers(self) -> Sequence[str]:
        """Rewards that can be named in a job, as `reward:NAME`."""
        return self._offers

    def activity(self) -> str:
        """See `Service.activity`."""
        groups = self._worker.running
        return f"scoring {groups} group{'' if groups == 1 else 's'}" if groups else "idle"

    async def start(self) -> None:
        """Start a process, learn from it what there is, and begin to take groups."""
        hello = await self._processes.start()
        for name, reason in hello.broken.items():
            log.error("reward %s cannot be used: %s", name, reason)
        self._offers = [f"reward:{name}" for name in hello.names]
        await self._finished.start(self._node.tasks)
        self._node.tasks.start("groups", self._worker.run())
        self._node.tasks.start("checks", self._checker.run())

    async def stop(self) -> None:
        """See `Service.stop`."""
        await asyncio.gather(*(worker.stop(self._node.drain_seconds) for worker in (self._worker, self._checker)))
        await self._processes.close()


def build(config: RewardConfig, node: Node) -> RewardService:
    """What `shared.process` calls."""
    return RewardService(config, node)
