"""Promises: waited for, given up."""

from __future__ import annotations

import asyncio

from services.gateway import ids, results
from services.gateway.context import NOTHING, Answer, Call, Endpoint, Gateway
from services.gateway.errors import Gone
from services.gateway.ids import Owned
from shared import topology
from shared.bus import BLOB_HEADER, CLAIM_CHECK_BYTES
from shared.contracts.base import Strict
from shared.contracts.blobs import BlobRef
from shared.errors import UserError
from shared.tables import Stored
from shared.wire import decode

LARGE_RESULT = 64 * 1024
"""Results of more bytes are translated in a thread, so that nobody waits for them."""


class RetrieveFuture(Strict):
    """Waits for a result."""

    request_id: str
    allow_metadata_only: bool = False


class CancelFuture(Strict):
    """Nobody waits any more."""

    request_id: str


async def retrieve(gateway: Gateway, call: Call) -> Answer | dict[str, object]:
    """A result, once it is there. Held for a while if it is not; then the client asks again."""
    asked: RetrieveFuture = call.body
    owned = ids.parse_request(asked.request_id)
    await gateway.records.session(call.caller, owned.session)
    found = await gateway.hub.result(owned.session, asked.request_id, gateway.config.poll_seconds)
    if found is None:
        return await _not_yet(gateway, call, owned, asked.request_id)
    if asked.allow_metadata_only and (size := size_of(found)) > CLAIM_CHECK_BYTES:
        return {"status": "complete_metadata", "response_payload_size": size}
    result, _ = await gateway.bus.open(topology.ANSWERS, found.body, found.headers)
    if size_of(found) > LARGE_RESULT:
        return await asyncio.to_thread(results.answer, result)
    return results.answer(result)


async def cancel(gateway: Gateway, call: Call) -> Answer:
    """Free the place of a sample that nobody waits for. Operations of a run are done all the same."""
    owned = ids.parse_request(call.body.request_id)
    await gateway.records.session(call.caller, owned.session)
    if owned.kind != "sample":
        raise UserError("only samples can be given up: the operations of a run build on each other")
    await gateway.bus.abandon(call.body.request_id)
    return NOTHING


async def custom_loss(_: Gateway, __: Call) -> Answer:
    """Refused: the flag that has clients ask for it is off."""
    raise UserError(
        "custom losses do not run on this server: create_custom_loss and forward_backward_custom run them in the client"
    )


def size_of(found: Stored) -> int:
    """Bytes of a result, here or in the blob store."""
    ref = found.headers.get(BLOB_HEADER)
    return len(found.body) if ref is None else int(decode(ref.encode(), BlobRef, json=True).size)


async def _not_yet(gateway: Gateway, call: Call, owned: Owned, request: str) -> dict[str, object]:
    """Why there is no result yet. Raise `Gone` if there will be none."""
    if owned.kind == "sample":
        sampler = await gateway.records.sampler(call.caller, owned.id)
        model, service = sampler.base_model, "sampler"
        if not gateway.closing and await _is_over(gateway, model, request):
            gateway.in_flight.remove(request)
            raise Gone(f"request {request} is not known (any more): results are kept for an hour")
    else:
        model, service = (await gateway.records.run(call.caller, owned.id)).base_model, "trainer"
    state, reason = "active", None
    if not gateway.models.has(service, model):
        state, reason = "paused_capacity", f"no {service} of {model} is running"
    elif gateway.in_flight.refusal(call.caller.tenant, gateway.limits_of(call.caller.tenant), 0) is not None:
        state, reason = "paused_rate_limit", f"{call.caller.tenant} is at its limit of requests in flight"
    gateway.metrics.try_again.labels(state).inc()
    answer: dict[str, object] = {"type": "try_again", "request_id": request, "queue_state": state}
    return answer if reason is None else {**answer, "queue_state_reason": reason}


async def _is_over(gateway: Gateway, model: str, request: str) -> bool:
    """Whether a sample was answered so long ago that the answer is gone: none waits or is in work for its model."""
    empty = await gateway.bus.last_place(topology.SAMPLES, pool=model) == 0
    return empty and await gateway.bus.stored_answer(request) is None


ENDPOINTS = (
    Endpoint("POST", "retrieve_future", retrieve, body=RetrieveFuture),
    Endpoint("POST", "cancel_future", cancel, body=CancelFuture),
    Endpoint("POST", "create_custom_loss", custom_loss, body=bytes),
)
