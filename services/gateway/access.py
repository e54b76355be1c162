"""Who may read which checkpoint."""

from __future__ import annotations

import time

from services.gateway.context import Call, Gateway
from services.gateway.errors import NotFound
from shared import checkpoints, topology
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord


async def readable_checkpoint(
    gateway: Gateway, call: Call, key: CheckpointKey, access_token: str | None = None
) -> CheckpointRecord:
    """A checkpoint that the caller may read: its own, a public one, or one of the tenant whose key it has.

    Raise `NotFound` for all others, and `Unauthorized` for a key that is not good.
    """
    tenants = {call.caller.tenant}
    if access_token:
        tenants.add(gateway.callers.by_key(access_token).tenant)
    entry = await gateway.bus.table(topology.CHECKPOINTS).get(checkpoints.key_in_bucket(key))
    record = entry.value if entry is not None else None
    if record is None or not (record.public or record.owner in tenants):
        raise NotFound(f"there is no checkpoint {checkpoints.path_of(key)}")
    if record.expires is not None and record.expires <= time.time():
        raise NotFound(f"checkpoint {checkpoints.path_of(key)} has expired")
    return record
