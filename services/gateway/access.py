"""Who may read which checkpoint, and that it is written down."""

from __future__ import annotations

import time

from services.gateway.context import Call, Gateway
from services.gateway.errors import Forbidden, NotFound, Unauthorized
from shared import topology
from shared.checkpoints import details_of, key_in_bucket, path_of
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord


async def readable_checkpoint(
    gateway: Gateway, call: Call, key: CheckpointKey, purpose: str, access_token: str | None = None
) -> CheckpointRecord:
    """A checkpoint that the caller may read: its own, a public one, or one of the tenant whose key it has.

    Raise `NotFound` for all others, and `Forbidden` for an access token that is not good.
    """
    tenants = {call.caller.tenant, await _tenant_of(gateway, call, access_token)}
    entry = await gateway.bus.table(topology.CHECKPOINTS).get(key_in_bucket(key))
    record = entry.value if entry is not None else None
    if record is None or not (record.public or record.owner in tenants):
        raise NotFound(f"there is no checkpoint {path_of(key)}")
    if not is_live(record):
        raise NotFound(f"checkpoint {path_of(key)} has expired")
    await gateway.audit(call, "checkpoint_read", purpose=purpose, **details_of(record))
    return record


def is_live(record: CheckpointRecord) -> bool:
    """Whether a checkpoint has not expired; what has is deleted a little later."""
    return record.expires is None or record.expires > time.time()


async def _tenant_of(gateway: Gateway, call: Call, access_token: str | None) -> str:
    if not access_token:
        return call.caller.tenant
    try:
        return gateway.callers.by_key(access_token).tenant
    except Unauthorized as error:
        # The caller's own key is good: another status than that of a bad one.
        await gateway.audit(call, "key_refused", purpose="weights_access_token", reason=str(error))
        raise Forbidden(f"the weights access token is not good: {error}") from None
