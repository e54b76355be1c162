"""Checkpoints: listed, published, given a time to live, deleted. Each change can be repeated without harm."""

from __future__ import annotations

import time
from typing import Annotated, Any

from msgspec import Meta

from services.gateway.access import readable_checkpoint
from services.gateway.context import NOTHING, Answer, Call, Endpoint, Gateway
from services.gateway.errors import NotFound
from services.gateway.ids import shown
from services.gateway.rest.answers import Checkpoints, WeightsInfo, checkpoint_of
from services.gateway.rest.holdings import key_of, live_checkpoints, owned, store
from services.gateway.rest.queries import Page, Scope
from shared.checkpoints import details_of, parse_path
from shared.contracts.base import Strict
from shared.contracts.checkpoints import CheckpointRecord

CHECKPOINTS_OF_A_PAGE = 100
LEAST_TTL = 3600
MOST_TTL = 10 * 365 * 24 * 3600

Ttl = Annotated[int, Meta(ge=LEAST_TTL, le=MOST_TTL)]


class SetTtl(Strict):
    """Lets a checkpoint expire so many seconds from now, or never."""

    ttl_seconds: Ttl | None


class AskInfo(Strict):
    """Asks what a checkpoint is."""

    tinker_path: str


async def list_of_run(gateway: Gateway, call: Call) -> Checkpoints:
    """All checkpoints of a run, newest first; of somebody else's run those that are public."""
    run = call.path["run"]
    record = (await gateway.runs.fresh()).get((run,))
    mine = record is not None and Scope.of(call.query, call.caller).has(record.owner)
    found = [
        checkpoint
        for checkpoint in await live_checkpoints(gateway)
        if checkpoint.key.run == run and (mine or checkpoint.public)
    ]
    if not mine and not found:
        raise NotFound(f"there is no training run {shown(run)}")
    return Checkpoints([checkpoint_of(checkpoint) for checkpoint in newest_first(found)])


async def list_of_user(gateway: Gateway, call: Call) -> Checkpoints:
    """A page of all checkpoints of the caller's, newest first."""
    page = Page.of(call.query, CHECKPOINTS_OF_A_PAGE)
    tenant = call.caller.tenant
    found = newest_first([checkpoint for checkpoint in await live_checkpoints(gateway) if checkpoint.owner == tenant])
    return Checkpoints([checkpoint_of(checkpoint) for checkpoint in page.cut(found)], page.cursor(found))


async def info(gateway: Gateway, call: Call) -> WeightsInfo:
    """What a checkpoint of the caller's, or a public one, is."""
    asked: AskInfo = call.body
    record = await readable_checkpoint(gateway, call, parse_path(asked.tinker_path), "weights_info")
    return WeightsInfo(
        base_model=record.base_model,
        lora_rank=record.lora.rank,
        train_unembed=record.lora.train_unembed,
        train_mlp=record.lora.train_mlp,
        train_attn=record.lora.train_attn,
    )


async def publish(gateway: Gateway, call: Call) -> Answer:
    """Let everybody read a checkpoint. It may be public already."""
    return await _change(gateway, call, "checkpoint_published", public=True)


async def unpublish(gateway: Gateway, call: Call) -> Answer:
    """Let nobody else read a checkpoint any more. It may be private already."""
    return await _change(gateway, call, "checkpoint_unpublished", public=False)


async def set_ttl(gateway: Gateway, call: Call) -> Answer:
    """Let a checkpoint expire, or stay."""
    asked: SetTtl = call.body
    expires = None if asked.ttl_seconds is None else time.time() + asked.ttl_seconds
    return await _change(gateway, call, "checkpoint_ttl_set", expires=expires)


async def delete(gateway: Gateway, call: Call) -> Answer:
    """Remove a checkpoint for good."""
    entry = await owned(gateway, call.caller, key_of(call))
    if not await store(gateway).delete(entry.value.key, revision=entry.revision):
        # Somebody has changed or deleted it in between: the second look tells which.
        entry = await owned(gateway, call.caller, key_of(call))
        await store(gateway).delete(entry.value.key)
    await gateway.audit(call, "checkpoint_deleted", **details_of(entry.value))
    return NOTHING


def newest_first(records: list[CheckpointRecord]) -> list[CheckpointRecord]:
    """In the order of lists. Among those of one moment the order is arbitrary, but always the same."""
    return sorted(records, key=lambda record: (record.created, str(record.key)), reverse=True)


async def _change(gateway: Gateway, call: Call, event: str, **changes: Any) -> Answer:
    entry = await owned(gateway, call.caller, key_of(call))
    changed = await store(gateway).change(entry.value.key, **changes)
    if changed is None:
        await owned(gateway, call.caller, key_of(call))  # deleted in between: says so
        return NOTHING
    await gateway.audit(call, event, **details_of(changed), **changes)
    return NOTHING


_OF_RUN = "training_runs/{run}/checkpoints"
_ONE = _OF_RUN + "/{folder}/{name}"

ENDPOINTS = (
    Endpoint("GET", _OF_RUN, list_of_run),
    Endpoint("GET", "checkpoints", list_of_user),
    Endpoint("POST", "weights_info", info, body=AskInfo),
    Endpoint("POST", _ONE + "/publish", publish),
    Endpoint("DELETE", _ONE + "/publish", unpublish),
    Endpoint("PUT", _ONE + "/ttl", set_ttl, body=SetTtl),
    Endpoint("DELETE", _ONE, delete),
)
