"""The files of a policy, from the blob store, by what the `policies` bucket says of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from shared import topology
from shared.bus import Bus
from shared.contracts.policies import PolicyRecord, PolicyRef
from shared.errors import UserError


class PolicyFiles:
    """Fetches policies of one base model."""

    def __init__(self, bus: Bus, base_model: str) -> None:
        self._blobs = bus.blobs
        self._table = bus.table(topology.POLICIES)
        self._base_model = base_model

    async def fetch(self, policy: PolicyRef) -> Mapping[str, bytes]:
        """PEFT's files by name, exactly those that were published.

        Raise `UserError` for an unknown policy, `PermanentError` if a file is missing or not what was written.
        """
        record = await self._record(policy)
        config, weights = await asyncio.gather(self._blobs.get(record.config), self._blobs.get(record.weights))
        return {"adapter_config.json": config, "adapter_model.safetensors": weights}

    async def _record(self, policy: PolicyRef) -> PolicyRecord:
        entry = await self._table.get((policy.run, str(policy.version)))
        if entry is None:
            raise UserError(f"policy {policy} does not exist (any more): name one that was published and not deleted")
        if entry.value.base_model != self._base_model:
            raise UserError(f"policy {policy} belongs to {entry.value.base_model}, not to {self._base_model}")
        return entry.value
