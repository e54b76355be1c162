"""Plays groups without environments, rewards and samplers: every group comes back at once, in the order asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from shared import topology
from shared.bus import Bus, Delivery
from shared.contracts.base import Failure
from shared.contracts.episodes import GroupScored, PlayGroup, Rollout
from shared.worker import Worker, WorkerMetrics


class FakePlayer:
    """Used with `async with`. `before` is called with each group; all that were played are kept in `played`.

    Every episode has the reward 1, except that groups with an index in `failing` fail. While `gate` is closed, the next
    group waits.
    """

    def __init__(
        self, bus: Bus, before: Callable[[PlayGroup], None] = lambda _: None, failing: frozenset[int] = frozenset()
    ) -> None:
        self.played: list[PlayGroup] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._bus = bus
        self._before = before
        self._failing = failing
        self._worker = Worker(
            bus, topology.GROUP_PLAYERS, self._handle, concurrency=1, metrics=WorkerMetrics(CollectorRegistry())
        )

    async def __aenter__(self) -> FakePlayer:
        self._running = asyncio.create_task(self._worker.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._worker.stop(1)
        await self._running

    async def _handle(self, delivery: Delivery[PlayGroup]) -> None:
        group = delivery.message
        self._before(group)
        await self.gate.wait()
        self.played.append(group)
        fails = group.group.index in self._failing
        scored = GroupScored(
            job=group.job,
            group=group.group,
            rollouts=[] if fails else [Rollout(reward=1.0)] * group.size,
            failure=Failure(message="it fails") if fails else None,
        )
        await self._bus.publish(topology.SCORED, scored, msg_id=f"{group.job}/{group.group}/scored", job=group.job)
