"""What a service is given (its name, the bus, the blob store, telemetry, tasks) and the shape that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.blobs import BlobStore
from shared.bus import Bus
from shared.observe import Telemetry
from shared.tasks import Tasks
from shared.worker import WorkerMetrics


@dataclass(frozen=True)
class Node:
    """One process of the mesh, or one of several services in a process."""

    service: str
    replica: str
    bus: Bus
    blobs: BlobStore
    telemetry: Telemetry
    worker_metrics: WorkerMetrics
    tasks: Tasks
    drain_seconds: float


class Service(Protocol):
    """What `shared.process` runs."""

    @property
    def base_model(self) -> str | None:
        """Samplers and trainers: the model that they serve."""

    @property
    def offers(self) -> Sequence[str]:
        """What can be named in a job: environments, rewards."""

    def activity(self) -> str:
        """What it is doing now, in a few words, for people."""

    async def start(self) -> None:
        """Begin; return when work can be taken. Raise `UserError` if the configuration cannot work."""

    async def stop(self) -> None:
        """Finish what runs within `Node.drain_seconds`, hand back the rest."""
