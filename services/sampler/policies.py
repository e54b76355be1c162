"""The policies that an engine holds: fetched when asked for, kept while used, the least recently used one dropped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator

from services.sampler.engines.base import SamplerEngine
from services.sampler.metrics import SamplerMetrics
from services.sampler.policy import victim
from shared import topology
from shared.contracts.policies import PolicyRecord, PolicyRef
from shared.errors import UserError
from shared.node import Node

log = logging.getLogger(__name__)


class Policies:
    """Sees to it that a request's policy is loaded before and stays until after."""

    def __init__(self, node: Node, engine: SamplerEngine, metrics: SamplerMetrics) -> None:
        self._blobs = node.blobs
        self._table = node.bus.table(topology.POLICIES)
        self._engine = engine
        self._metrics = metrics
        self._users: Counter[PolicyRef] = Counter()
        self._last_used: dict[PolicyRef, float] = {}
        self._changed = asyncio.Condition()
        self._loading: dict[PolicyRef, asyncio.Lock] = {}

    @contextlib.asynccontextmanager
    async def using(self, policy: PolicyRef | None) -> AsyncIterator[None]:
        """Hold a policy loaded inside the block. Raise `UserError` for an unknown one."""
        if policy is None:
            yield
            return
        self._users[policy] += 1
        try:
            await self._ensure(policy)
            yield
        finally:
            self._users[policy] -= 1
            self._last_used[policy] = time.monotonic()
            if policy not in self._engine.policies:
                self._last_used.pop(policy, None)
            async with self._changed:
                self._changed.notify_all()

    async def prefetch(self, record: PolicyRecord) -> None:
        """Load an announced policy if there is a place for it without anybody waiting."""
        room = len(self._engine.policies) < self._engine.capacity
        if room or victim(self._last_used, self._in_use()) is not None:
            async with self.using(record.policy):
                log.info("policy %s is ready", record.policy, extra={"run": record.policy.run, "policy": record.policy})

    def _in_use(self) -> set[PolicyRef]:
        return {policy for policy, users in self._users.items() if users}

    async def _ensure(self, policy: PolicyRef) -> None:
        # One lock a policy: many requests for a new policy fetch it once, and others are not held up.
        lock = self._loading.setdefault(policy, asyncio.Lock())
        async with lock:
            if policy in self._engine.policies:
                return
            with self._metrics.policy_seconds.time():
                record = await self._record(policy)
                files = {
                    "adapter_config.json": await self._blobs.get(record.config),
                    "adapter_model.safetensors": await self._blobs.get(record.weights),
                }
                await self._make_room()
                await self._engine.load_policy(policy, files)
            self._last_used[policy] = time.monotonic()
        self._loading.pop(policy, None)

    async def _record(self, policy: PolicyRef) -> PolicyRecord:
        entry = await self._table.get((policy.run, str(policy.version)))
        if entry is None:
            raise UserError(f"policy {policy} does not exist (any more): name one that was published and not deleted")
        if entry.value.base_model != self._engine.base_model:
            raise UserError(f"policy {policy} belongs to {entry.value.base_model}, not to {self._engine.base_model}")
        return entry.value

    async def _make_room(self) -> None:
        async with self._changed:
            while len(self._engine.policies) >= self._engine.capacity:
                gone = victim({p: t for p, t in self._last_used.items() if p in self._engine.policies}, self._in_use())
                if gone is None:
                    await self._changed.wait()
                    continue
                self._last_used.pop(gone, None)
                await self._engine.unload_policy(gone)
