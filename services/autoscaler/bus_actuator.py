"""Acts on machines whose supervisors follow the bus: what is to run stands in the bucket `placements`.

A supervisor lists its GPUs in `nodes`, starts what is placed there, and takes the entry away when a replica that was
draining has ended. Whether a replica is ready, the replica itself says in `replicas`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from services.autoscaler.actuator import Cluster
from services.autoscaler.config import GroupConfig
from services.autoscaler.observed import Gpu, Replica, Shape, State
from services.autoscaler.plan import Drain, Start
from shared import topology
from shared.contracts.placement import PlacementRecord
from shared.leases import Leases
from shared.node import Node

LEADER = ("autoscaler", "leader")


class BusActuator:
    """See `Actuator`."""

    def __init__(self, node: Node, groups: Sequence[GroupConfig]) -> None:
        self._groups = {group.name: group for group in groups}
        self._nodes = node.bus.table(topology.NODES)
        self._placements = node.bus.table(topology.PLACEMENTS)
        self._replicas = node.bus.table(topology.REPLICAS)
        self._leases = Leases(node.bus, node.replica, node.tasks, lambda _: None)
        self._leases.start()

    async def start(self) -> None:
        """See `Actuator.start`."""

    async def look(self) -> Cluster:
        """See `Actuator.look`."""
        nodes = [entry.value for entry in await self._nodes.items()]
        gpus = tuple(
            Gpu(gpu.name, node.node, gpu.memory_gib, gpu.type, node.cordoned) for node in nodes for gpu in node.gpus
        )
        placed = [entry.value for entry in await self._placements.items()]
        ready = {entry.value.replica for entry in await self._replicas.items() if entry.value.ready}
        # Without any machine there is nothing to say of replicas: it is restarting, or the bus has just come back.
        return Cluster(gpus or None, tuple(_replica(record, ready) for record in placed))

    async def act(self, starts: Sequence[Start], drains: Sequence[Drain]) -> None:
        """See `Actuator.act`."""
        for drain in drains:
            entry = await self._placements.get(drain.replica)
            if entry is not None and not entry.value.draining:
                draining = msgspec.structs.replace(entry.value, draining=True)
                await self._placements.update(drain.replica, draining, entry.revision)
        for start in starts:
            await self._placements.create(start.replica, _record(start, self._groups[start.group]))

    async def lead(self) -> bool:
        """See `Actuator.lead`."""
        return await self._leases.claim(LEADER)

    async def close(self) -> None:
        """See `Actuator.close`."""
        await self._leases.release(LEADER)


def _replica(record: PlacementRecord, ready: set[str]) -> Replica:
    state: State = "draining" if record.draining else "ready" if record.replica in ready else "starting"
    shape = Shape(record.memory_gib, record.milli, len(record.gpus), frozenset(record.types))
    return Replica(
        record.replica, record.group, state, tuple(record.gpus), shape, record.since, record.replaces, record.pinned
    )


def _record(start: Start, group: GroupConfig) -> PlacementRecord:
    return PlacementRecord(
        replica=start.replica,
        group=start.group,
        role=group.role,
        base_model=group.base_model,
        gpus=list(start.gpus),
        memory_gib=start.shape.memory_gib,
        milli=start.shape.milli,
        since=time.time(),
        types=sorted(start.shape.types),
        replaces=start.replaces,
    )
