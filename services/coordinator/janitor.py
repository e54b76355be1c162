"""Removes what clients' sessions leave behind, now and then; of several coordinators, the one that has the lease.

`services.coordinator.housekeeping` decides. A look reads the buckets entry by entry, half a millisecond each, and the
rest between two looks grows with them, so that looking never takes more than a tenth of the time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable

import msgspec

from services.coordinator.config import CoordinatorConfig
from services.coordinator.housekeeping import Removals, Rules, Seen, Since, removals
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.removal import close_run, delete_policy
from shared import topology
from shared.checkpoints import Checkpoints, details_of, path_of
from shared.contracts.checkpoints import CheckpointRecord
from shared.contracts.policies import PolicyRef
from shared.contracts.tenants import Audited
from shared.errors import MeshError
from shared.leases import Key, Leases
from shared.node import Node
from shared.tables import Entry

log = logging.getLogger(__name__)

LEASE: Key = ("janitor", "janitor")
REST = 10
"""How many times as long as a look took it rests at least."""


class Janitor:
    """Looks around every `janitor_seconds`, while it has the lease."""

    def __init__(self, node: Node, config: CoordinatorConfig, metrics: CoordinatorMetrics) -> None:
        self._node = node
        self._seconds = config.janitor_seconds
        self._rules = Rules(
            silence=config.silence_seconds, grace=config.session_grace_seconds, unnamed=config.unnamed_policy_seconds
        )
        self._metrics = metrics
        self._leases = Leases(node.bus, node.replica, node.tasks, lambda _: None)
        self._since: Since = {}
        bus = node.bus
        self._checkpoints = Checkpoints(bus, node.blobs)
        self._sessions = bus.table(topology.SESSIONS)
        self._heartbeats = bus.table(topology.HEARTBEATS)
        self._runs = bus.table(topology.RUNS)
        self._policies = bus.table(topology.POLICIES)
        self._recorded = bus.table(topology.CHECKPOINTS)
        self._samplers = bus.table(topology.SAMPLERS)
        self._inflight = bus.table(topology.INFLIGHT)

    def start(self) -> None:
        """Begin to look around."""
        self._leases.start()
        self._node.tasks.start("janitor", self._work())

    async def stop(self) -> None:
        """Let another coordinator do it."""
        try:
            await self._leases.release(LEASE)
        except MeshError as error:
            log.warning("the janitor's lease was not released, and will expire: %s", error)

    async def _work(self) -> None:
        while True:
            began = time.monotonic()
            try:
                if await self._leases.claim(LEASE):
                    await self.look()
                else:
                    self._since = {}  # what somebody else has seen since, this one has not
            except MeshError as error:
                log.warning("the janitor looks again later: %s", error)
            await asyncio.sleep(max(self._seconds, REST * (time.monotonic() - began)))

    async def look(self) -> None:
        """Look once, and remove what is due."""
        found, self._since = removals(await self._look(), self._since, self._rules, time.time())
        await self._remove(found)

    async def _look(self) -> Seen:
        policies = [entry.value.policy for entry in await self._policies.items()]  # before what may name them
        return Seen(
            policies=policies,
            sessions={entry.key[0]: entry.value for entry in await self._sessions.items()},
            alive=frozenset(entry.key[0] for entry in await self._heartbeats.items()),
            runs={entry.key[0]: entry.value for entry in await self._runs.items()},
            checkpoints=await self._recorded.items(),
            samplers=[entry.value for entry in await self._samplers.items()],
            inflight={entry.key[0]: entry.value for entry in await self._inflight.items()},
        )

    async def _remove(self, due: Removals) -> None:
        for checkpoint in due.expired:
            await self._done("expired checkpoint", path_of(checkpoint.value.key), self._expire(checkpoint))
        for session in due.lapsed:
            await self._done("lapsed session", session, self._end(session))
        for run in due.runs:
            await self._done("run", run, close_run(self._node.bus, self._node.blobs, run))
        for sampler in due.samplers:
            await self._done("sampler", sampler, self._samplers.delete(sampler))
        for run in due.inflight:
            await self._done("inflight", run, self._inflight.delete(run))
        for policy in due.policies:
            await self._done("policy", str(policy), self._delete(policy))

    async def _done(self, what: str, name: str, removing: Awaitable[object]) -> None:
        """Remove one thing. If that fails, the next look finds it again."""
        try:
            await removing
        except MeshError as error:
            log.warning("%s %s stays for now: %s", what, name, error)
        else:
            self._metrics.removed.labels(what).inc()
            log.info("%s %s was put away", what, name)

    async def _expire(self, checkpoint: Entry[CheckpointRecord]) -> None:
        record = checkpoint.value
        if not await self._checkpoints.delete(record.key, revision=checkpoint.revision):
            return
        details = details_of(record)  # the bill for the hours in which it was there is made from these
        entry = Audited(at=time.time(), owner=record.owner, event="checkpoint_expired", details=details)
        await self._node.bus.publish(topology.AUDITS, entry, owner=record.owner)

    async def _end(self, session: str) -> None:
        entry = await self._sessions.get(session)
        if entry is None or entry.value.ended is not None or await self._heartbeats.get(session) is not None:
            return
        ended = msgspec.structs.replace(
            entry.value, ended="lapsed", ended_at=time.time(), end_detail="its client was not heard of any more"
        )
        await self._sessions.update(session, ended, entry.revision)  # its client may have ended it in this moment

    async def _delete(self, policy: PolicyRef) -> None:
        await delete_policy(self._node.bus, self._node.blobs, policy.run, policy.version)
