"""Which models can be trained and sampled now, and under which names."""

from __future__ import annotations

import time
from pathlib import Path

from services.gateway.ids import shown
from services.gateway.mirrors import Mirror
from shared import topology
from shared.bus import Bus
from shared.contracts.replicas import CONTEXT, DIRECTORY, SCALED, ReplicaRecord
from shared.errors import UserError
from shared.tasks import Tasks

LIVES = topology.REPLICAS.ttl
"""Seconds for which a replica counts as there after it was last heard of."""


class Models:
    """The models of the mesh, as its replicas say."""

    def __init__(self, bus: Bus) -> None:
        self._heard: dict[str, float] = {}
        self._replicas: Mirror[ReplicaRecord] = Mirror(bus.table(topology.REPLICAS), self._hear)
        self._aliases: Mirror[str] = Mirror(bus.table(topology.ALIASES))
        self._known: dict[str, dict[str, str]] = {}
        """Offers of every model that was ever heard of: while its replicas restart it is still known."""

    async def start(self, tasks: Tasks) -> None:
        """Know what there is."""
        await self._replicas.start(tasks, "replicas")
        await self._aliases.start(tasks, "aliases")

    def served(self, name: str) -> str:
        """The name under which a model is served, given it, an alias, or its directory. Raise `UserError`."""
        found = self._aliases.get(name) or name
        if found in self._known:
            return found
        for model, offers in self._known.items():
            if "/" in name and DIRECTORY in offers and Path(name).resolve() == Path(offers[DIRECTORY]):
                return model
        names = ", ".join(sorted({*self._known, *self.aliases})) or "none is served now"
        raise UserError(
            f"model {shown(name)} is not served here; there are: {names} (`openrl model add` and `openrl model alias` "
            "make more)"
        )

    @property
    def names(self) -> list[str]:
        """All models."""
        return sorted(self._known)

    @property
    def aliases(self) -> dict[str, str]:
        """Other names with the names under which the models are served."""
        return {key[0]: model for key, model in self._aliases.items()}

    def context(self, model: str) -> int | None:
        """How many tokens fit into a model, where it says so."""
        text = self._known.get(model, {}).get(CONTEXT)
        return int(text) if text else None

    def directory(self, model: str) -> str | None:
        """Where the model's files lie on the machines of its replicas."""
        return self._known.get(model, {}).get(DIRECTORY)

    def has(self, service: str, model: str) -> bool:
        """Whether a `trainer` or `sampler` of a model lives now, or an autoscaler starts one when it is asked for."""
        oldest = time.monotonic() - LIVES
        scaled = f"{SCALED}{service}:{model}"
        return any(
            (record.service == service and record.base_model == model) or scaled in record.offers
            for (replica,), record in self._replicas.values.items()
            if self._heard.get(replica, 0) > oldest
        )

    def _hear(self, key: tuple[str, ...], record: ReplicaRecord | None) -> None:
        if record is None:
            self._heard.pop(key[0], None)
            return
        self._heard[key[0]] = time.monotonic()
        for offer in record.offers:
            if offer.startswith(SCALED):
                self._known.setdefault(offer.removeprefix(SCALED).partition(":")[2], {})
        if record.base_model is None or record.service not in ("sampler", "trainer"):
            return
        offers = self._known.setdefault(record.base_model, {})
        for offer in record.offers:
            begins, _, rest = offer.partition(":")
            offers[f"{begins}:"] = rest
