"""Approves of every environment and reward that a coordinator asks about, where no service runs that could."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CollectorRegistry

from shared import topology
from shared.bus import Bus, Delivery
from shared.contracts.checks import CheckAnswer
from shared.tasks import cancelled
from shared.worker import Worker, WorkerMetrics


@contextlib.asynccontextmanager
async def approving(bus: Bus) -> AsyncIterator[None]:
    """Answer as long as the block runs."""

    async def approve(delivery: Delivery[Any]) -> None:
        await bus.answer(CheckAnswer(request_id=delivery.message.request_id))

    checkers = (topology.ENVIRONMENT_CHECKERS, topology.REWARD_CHECKERS)
    workers: list[Worker[Any]] = [
        Worker(bus, checker, approve, concurrency=4, metrics=WorkerMetrics(CollectorRegistry())) for checker in checkers
    ]
    tasks = {asyncio.create_task(worker.run()) for worker in workers}
    try:
        yield
    finally:
        for worker in workers:
            await worker.stop(1)
        await cancelled(tasks)
