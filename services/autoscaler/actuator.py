"""What carries a plan out. An actuator needs no judgement, and remembers nothing: it shows what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.autoscaler.observed import Gpu, Replica
from services.autoscaler.plan import Drain, Start


@dataclass(frozen=True)
class Cluster:
    """What there is."""

    gpus: tuple[Gpu, ...] | None
    """None: they could not be listed."""
    replicas: tuple[Replica, ...]
    problems: tuple[str, ...] = ()
    """What people should know of: replicas that do not get on, GPUs that cannot be used."""


class Actuator(Protocol):
    """A machine with a supervisor, or a Kubernetes cluster."""

    async def start(self) -> None:
        """Begin to look. Raise `UserError` if that can never work."""

    async def look(self) -> Cluster:
        """What there is now. Raise `TemporaryError` if nothing can be said."""

    async def act(self, starts: Sequence[Start], drains: Sequence[Drain]) -> None:
        """Begin to carry these out. What was begun before is not begun again.

        Raise `TemporaryError`; what was not done then, the next plan asks for again.
        """

    async def lead(self) -> bool:
        """Whether this autoscaler is the one that acts; the others only watch. Renews its turn."""

    async def close(self) -> None:
        """Give up its turn, and what it holds."""
