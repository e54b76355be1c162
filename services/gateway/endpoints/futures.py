"""Promises: waited for, given up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

import msgspec

from services.gateway import ids, results
from services.gateway.context import NOTHING, Answer, Call, Endpoint, Gateway
from services.gateway.errors import Gone
from services.gateway.ids import Owned
from shared import topology
from shared.bus import BLOB_HEADER, CLAIM_CHECK_BYTES, REQUEST_HEADER
from shared.contracts.base import Strict
from shared.contracts.blobs import BlobRef
from shared.contracts.results import RequestFailed
from shared.errors import UserError
from shared.scans import Stored
from shared.tasks import cancelled
from shared.wire import decode

LARGE_RESULT = 64 * 1024
"""Results of more bytes are translated in a thread, so that nobody waits for them."""


AT_ONCE = 0.02
"""Seconds within which an answer must follow the one before to be told together with it."""
MOST_COMPLETIONS = 512
CLONE_SEQS = 1_000_000_000
"""Each copy of a client numbers its requests from its own number times this."""


class RetrieveFuture(Strict):
    """Waits for a result."""

    request_id: str
    allow_metadata_only: bool = False


class SamplerTarget(Strict):
    """One client of a sampler, among its copies."""

    sampling_session_id: str
    cloned_sampler_id: int = 0
    type: Literal["sampling_session"] = "sampling_session"


class RetrieveFutures(Strict):
    """Waits for any sample of a sampler."""

    target: SamplerTarget
    prev_cursor: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = []
    """Their results could be deleted now; they are kept for an hour all the same."""


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


async def retrieve_many(gateway: Gateway, call: Call) -> dict[str, object]:
    """Which samples of a sampler have been answered since the last time; held for a while if none has.

    The cursor is a place in the stream of results, so any gateway goes on where another one was.
    """
    asked: RetrieveFutures = call.body
    sampler, clone = asked.target.sampling_session_id, asked.target.cloned_sampler_id
    await gateway.records.sampler(call.caller, sampler)
    longest = gateway.config.poll_seconds
    seconds = longest if asked.timeout is None else min(max(asked.timeout, 0.0), longest)
    cursor, completions = asked.prev_cursor, list[dict[str, object]]()
    async with contextlib.aclosing(_answered(gateway, sampler, cursor, seconds)) as results_of_sampler:
        async for result in results_of_sampler:
            cursor = result.seq
            request = result.headers.get(REQUEST_HEADER, "")
            if ids.parse_request(request).seq // CLONE_SEQS == clone:
                gateway.in_flight.remove(request)
                completions.append(await _completion(gateway, request, result))
    return {"completions": completions, "cursor": cursor}


async def _completion(gateway: Gateway, request: str, result: Stored) -> dict[str, object]:
    opened, _ = await gateway.bus.open(topology.ANSWERS, result.body, result.headers)
    if isinstance(opened, RequestFailed):
        return {"state": "failed", "request_id": request}
    return {"state": "finished", "request_id": request, "response_payload_uncompressed_size": size_of(result)}


async def _answered(gateway: Gateway, sampler: str, after: int, seconds: float) -> AsyncGenerator[Stored, None]:
    """The answers behind a place: the first within so many seconds, and what follows it at once."""
    owned = ids.parse_sampler(sampler)
    reading = gateway.bus.read_answers(f"{owned.session}.{owned.kind}-{owned.number}", after=after)
    patience = max(seconds, AT_ONCE)
    closing = asyncio.ensure_future(gateway.hub.closing.wait())
    following = asyncio.ensure_future(anext(reading))
    try:
        for _ in range(MOST_COMPLETIONS):
            await asyncio.wait([following, closing], timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                return
            yield following.result()
            following = asyncio.ensure_future(anext(reading))
            patience = AT_ONCE
    finally:
        await cancelled([following, closing])


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
    Endpoint("POST", "retrieve_futures", retrieve_many, body=RetrieveFutures),
    Endpoint("POST", "cancel_future", cancel, body=CancelFuture),
    Endpoint("POST", "create_custom_loss", custom_loss, body=bytes),
)
