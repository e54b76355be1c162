"""What each process of the mesh says of itself."""

from __future__ import annotations

from shared.contracts.base import Contract

CONTEXT = "context:"
"""Begins the offer in which a sampler or trainer says how many tokens fit into its model: `context:8192`."""
DIRECTORY = "directory:"
"""Begins the offer in which it says where the model's files lie on its machine: `directory:/models/smollm2`."""
HTTP = "http:"
"""Begins the offer in which a gateway says on which port clients connect: `http:8470`."""


class ReplicaRecord(Contract):
    """A living process; its entry in the `replicas` bucket goes away by itself when it stops renewing it."""

    replica: str
    service: str
    pid: int
    host: str
    metrics_port: int
    activity: str = "starting"
    """What it is doing now, for people."""
    ready: bool = False
    base_model: str | None = None
    """Samplers and trainers: what they serve."""
    started: float = 0.0
    offers: list[str] = []
    """Environments and rewards that can be named in a job; of others what the words above begin."""
