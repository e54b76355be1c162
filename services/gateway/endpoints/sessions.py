"""Sessions: begun by every client, kept alive by it, ended by it or for it."""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec

from services.gateway import ids
from services.gateway.context import NOTHING, Answer, Call, Endpoint, Gateway
from services.gateway.errors import Gone
from shared import topology
from shared.contracts.base import Strict
from shared.contracts.sessions import Heartbeat, SessionRecord
from shared.errors import TemporaryError


class CreateSession(Strict):
    """Begins a session."""

    tags: list[str]
    sdk_version: str
    user_metadata: dict[str, Any] | None = None
    project_id: str | None = None
    display_name: str | None = None
    type: Literal["create_session"] = "create_session"


class SessionHeartbeat(Strict):
    """Its client is alive."""

    session_id: str
    type: Literal["session_heartbeat"] = "session_heartbeat"


class FinishReason(Strict):
    """How it ended."""

    type: Literal["success", "errored", "interrupted"]


class FinishSession(Strict):
    """Its client says goodbye."""

    reason: FinishReason
    detail: str | None = None


async def create(gateway: Gateway, call: Call) -> dict[str, str]:
    """Begin a session."""
    asked: CreateSession = call.body
    record = SessionRecord(
        session=ids.new_session(),
        owner=call.caller.tenant,
        created=time.time(),
        project=asked.project_id or call.caller.project,
        display_name=asked.display_name,
        tags=asked.tags,
        user_metadata=asked.user_metadata or {},
        sdk_version=asked.sdk_version,
    )
    await gateway.bus.table(topology.HEARTBEATS).put(record.session, Heartbeat(at=record.created))
    await gateway.records.sessions.table.put(record.session, record)
    await gateway.audit(call, "session_created", session=record.session)
    return {"type": "create_session", "session_id": record.session}


async def heartbeat(gateway: Gateway, call: Call) -> dict[str, str]:
    """Keep a session alive. `Gone` ends the client's heartbeats."""
    session = call.body.session_id
    await gateway.records.open_session(call.caller, session)
    await gateway.bus.table(topology.HEARTBEATS).put(session, Heartbeat(at=time.time()))
    return {"type": "session_heartbeat"}


async def finish(gateway: Gateway, call: Call) -> Answer:
    """End a session. The coordinator closes its runs. Ending it again changes nothing."""
    session = call.path["session"]
    await gateway.records.session(call.caller, session)
    for _ in range(5):  # somebody else, the coordinator perhaps, may write at the same moment
        if await _ended(gateway, session, call.body):
            gateway.records.sessions.forget(session)
            return NOTHING
    raise TemporaryError(f"session {session} is being changed by somebody else: try again")


async def _ended(gateway: Gateway, session: str, asked: FinishSession) -> bool:
    table = gateway.records.sessions.table
    entry = await table.get(session)
    if entry is None:
        raise Gone(f"session {session} is over")
    if entry.value.ended is not None:
        return True
    record = msgspec.structs.replace(
        entry.value, ended=asked.reason.type, ended_at=time.time(), end_detail=asked.detail
    )
    return await table.update(session, record, entry.revision) is not None


ENDPOINTS = (
    Endpoint("POST", "session_heartbeat", heartbeat, body=SessionHeartbeat),
    Endpoint("POST", "create_session", create, body=CreateSession),
    Endpoint("POST", "sessions/{session}/finish", finish, body=FinishSession),
)
