"""Starts and ends the replicas that an autoscaler has placed on this machine, and says which GPUs it has.

| waits for | does |
|---|---|
| an entry in `placements` on one of its GPUs | starts the replica, and again whenever it ends |
| the entry to say `draining`, or to go | SIGTERM; the replica finishes what it has; then the entry is taken away |

What is placed survives this supervisor: the next one starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import logging
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.local.config import ServiceCommand, Setting, service_command
from services.local.processes import Child
from shared import topology
from shared.bus import Bus
from shared.contracts.placement import GpuRecord, NodeRecord, PlacementRecord
from shared.errors import MeshError

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
ANNOUNCE_EVERY = 4
"""Looks between two announcements of this node."""
GIB = 1 << 30
SHARED_MEMORY = 0.8
"""Part of a machine's memory that is shared out where there is no GPU."""
MIB_PER_GIB = 1024

Start = Callable[[ServiceCommand], Child]
Remove = Callable[[Child], None]


def node_record() -> NodeRecord:
    """What this machine has; without a GPU, its processor stands for one."""
    node = socket.gethostname()
    gpus = [
        GpuRecord(name=f"{node}/{index}", index=index, type=kind, memory_gib=mib / MIB_PER_GIB)
        for index, kind, mib in _gpus()
    ]
    if not gpus:
        memory = psutil.virtual_memory().total * SHARED_MEMORY / GIB
        gpus = [GpuRecord(name=f"{node}/cpu", index="", type="cpu", memory_gib=round(memory, 1))]
    return NodeRecord(node=node, gpus=gpus)


def _gpus() -> list[tuple[str, str, float]]:
    """Index, type and MiB of each GPU."""
    if (command := shutil.which("nvidia-smi")) is None:
        return []
    asked = subprocess.run(
        [command, "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    if asked.returncode:
        log.warning("nvidia-smi failed, so no GPU is used: %s", asked.stderr.strip() or asked.stdout.strip())
        return []
    return [(row[0].strip(), row[1].strip(), float(row[2])) for row in csv.reader(asked.stdout.splitlines()) if row]


@dataclass(frozen=True)
class Placeable:
    """What may be placed here."""

    models: Mapping[str, Path]
    """Directories of the base models by name."""
    device: str = "auto"
    engine: str = "torch"
    """The samplers'."""


class Placed:
    """See the module's docstring."""

    def __init__(self, bus: Bus, node: NodeRecord, placeable: Placeable, start: Start, remove: Remove) -> None:
        self._node = node
        self._gpus = {gpu.name: gpu for gpu in node.gpus}
        self._placeable = placeable
        self._start = start
        self._remove = remove
        self._nodes = bus.table(topology.NODES)
        self._placements = bus.table(topology.PLACEMENTS)
        self._children: dict[str, Child] = {}

    async def keep(self) -> None:
        """Carry out what is placed here, for ever."""
        looks = 0
        while True:
            try:
                if looks % ANNOUNCE_EVERY == 0:
                    await self._nodes.put(self._node.node, self._node)
                await self.look()
            except MeshError as error:
                log.warning("placements cannot be read: %s", error)
            looks += 1
            await asyncio.sleep(LOOK_SECONDS)

    async def leave(self) -> None:
        """Nothing more is to be placed here."""
        with contextlib.suppress(MeshError):
            await self._nodes.delete(self._node.node)

    async def look(self) -> None:
        """Carry out what stands in the bucket now."""
        entries = [entry.value for entry in await self._placements.items()]
        here = {record.replica: record for record in entries if all(gpu in self._gpus for gpu in record.gpus)}
        for name, record in here.items():
            if name not in self._children and not record.draining:
                self._children[name] = self._start(self._command(record))
        for name, child in list(self._children.items()):
            placed = here.get(name)
            if (placed is None or placed.draining) and child.condition != "stopped":
                child.stop()
        await self._clear(here)

    async def _clear(self, here: Mapping[str, PlacementRecord]) -> None:
        """Take away what has ended."""
        for name, record in here.items():
            child = self._children.get(name)
            if record.draining and (child is None or child.condition == "stopped"):
                await self._placements.delete(name)
        for name, child in list(self._children.items()):
            if child.condition == "stopped":
                del self._children[name]
                self._remove(child)

    def _command(self, record: PlacementRecord) -> ServiceCommand:
        config: dict[str, Setting] = {
            "base_model": record.base_model,
            "model_dir": str(self._placeable.models.get(record.base_model, record.base_model)),
            "device": self._placeable.device,
        }
        if record.role == "sampler":
            config["engine"] = self._placeable.engine
        return service_command(record.role, record.replica, config, environment=self._environment(record))

    def _environment(self, record: PlacementRecord) -> dict[str, str]:
        indexes = [self._gpus[gpu].index for gpu in record.gpus]
        return {"CUDA_VISIBLE_DEVICES": ",".join(indexes)} if any(indexes) else {}
