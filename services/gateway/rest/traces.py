"""Traces of sessions: built when they are fetched, from what is kept by then.

Requests are those of the last hour, as long as results are kept; tokens by the second, checkpoints, runs and samplers
are those of the whole session.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Literal

from msgspec import Struct

from services.gateway import ids
from services.gateway.context import Answer, Call, Endpoint, Gateway
from services.gateway.errors import NotFound
from services.gateway.ids import shown
from services.gateway.rest import links
from services.gateway.rest.holdings import live_checkpoints
from services.gateway.rest.timeline import Timeline
from shared import topology
from shared.contracts.sessions import SessionRecord

PIECE = 256 << 10
"""Bytes that are sent at once."""


class Export(Struct, frozen=True):
    """Where a trace can be fetched."""

    status: Literal["ready"]
    url: str


async def export(gateway: Gateway, call: Call) -> Export:
    """A link to a session's trace."""
    record = await gateway.records.session(call.caller, call.path["session"])
    expires = time.time() + links.SECONDS
    await gateway.audit(call, "session_trace_exported", session=record.session)
    return Export("ready", links.link(gateway, call, _path(record.session), expires))


async def fetch(gateway: Gateway, call: Call) -> Answer:
    """The trace."""
    session = call.path["session"]
    links.check(gateway.signer, call, _path(session))
    record = (await gateway.sessions.fresh()).get((session,))
    if record is None:
        raise NotFound(f"there is no session {shown(session)} (any more)")
    return Answer(
        media_type="application/octet-stream",
        headers={"Content-Disposition": f'attachment; filename="{session}.pftrace"'},
        chunks=_together(_packets(gateway, record)),
    )


async def _packets(gateway: Gateway, session: SessionRecord) -> AsyncIterator[bytes]:
    timeline = Timeline(session)
    yield timeline.session(time.time())
    runs = {run.run: run for run in (await gateway.runs.fresh()).values() if run.session == session.session}
    for run in runs.values():
        yield timeline.run(run)
    for sampler in (await gateway.samplers.fresh()).values():
        if sampler.session == session.session:
            yield timeline.sampler(sampler)
    for checkpoint in await live_checkpoints(gateway):
        if checkpoint.key.run in runs:
            yield timeline.checkpoint(checkpoint)
    async for delivery in gateway.bus.scan(topology.TIMINGS, session=session.session):
        parent = ids.parse_request(delivery.message.request_id).id
        yield timeline.request(parent, delivery.message, delivery.time)
    async for used in gateway.bus.scan(topology.USED, since=session.created, owner=session.owner):
        if used.message.session == session.session:
            yield timeline.tokens(used.message)


async def _together(packets: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    gathered = bytearray()
    async for packet in packets:
        gathered += packet
        if len(gathered) >= PIECE:
            yield bytes(gathered)
            gathered.clear()
    yield bytes(gathered)


def _path(session: str) -> str:
    return f"traces/{session}.pftrace"


ENDPOINTS = (
    Endpoint("GET", "sessions/{session}/trace_export", export),
    Endpoint("GET", "traces/{session}.pftrace", fetch, public=True),
)
