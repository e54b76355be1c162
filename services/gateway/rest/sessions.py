"""Sessions: looked up, searched, moved between projects."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from services.gateway.auth import user_urn
from services.gateway.context import NOTHING, Answer, Call, Endpoint, Gateway
from services.gateway.errors import NotFound
from services.gateway.ids import shown
from services.gateway.rest.answers import Session, Sessions, at, metadata_of
from services.gateway.rest.holdings import live_checkpoints
from services.gateway.rest.queries import Page, Scope
from services.gateway.rest.search import Search, SearchCursor, project_of, search
from shared import topology
from shared.contracts.base import Strict
from shared.contracts.checkpoints import CheckpointRecord
from shared.contracts.sessions import SessionRecord
from shared.errors import TemporaryError

SESSIONS_OF_A_PAGE = 20
MOST_PROJECT = 200
TRIES = 5


class Reason(Struct, frozen=True):
    """How a session ended, as its client said."""

    type: Literal["success", "errored", "interrupted"]


class FinishedStatus(Struct, tag_field="type", tag="client_finished", frozen=True):
    """Its client has said that it is done."""

    reason: Reason
    detail: str | None


class ActiveStatus(Struct, tag_field="type", tag="active", frozen=True):
    """It goes on."""


class Summary(Struct, frozen=True):
    """What a search tells of a session."""

    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    status: FinishedStatus | ActiveStatus | None
    """None: its client has said nothing, and has not been heard of for long."""
    checkpoints_count: int
    display_name: str | None
    user_metadata: dict[str, str] | None
    checkpoint_storage_bytes: int


class Summaries(Struct, frozen=True):
    """A page of what a search found, newest first."""

    sessions: list[Summary]
    next_cursor: SearchCursor | None


class Move(Strict):
    """Moves a session into a project."""

    project_id: Annotated[str, Meta(min_length=1, max_length=MOST_PROJECT)]


async def list_sessions(gateway: Gateway, call: Call) -> Sessions:
    """Ids of a page of sessions, newest first."""
    page = Page.of(call.query, SESSIONS_OF_A_PAGE)
    found = await _visible(gateway, Scope.of(call.query, call.caller))
    found.sort(key=lambda session: (session.created, session.session), reverse=True)
    return Sessions([session.session for session in page.cut(found)])


async def get_session(gateway: Gateway, call: Call) -> Session:
    """A session with the ids of its runs and samplers, in the order in which they were made."""
    session = call.path["session"]
    record = (await gateway.sessions.fresh()).get((session,))
    if record is None or not Scope.of(call.query, call.caller).has(record.owner):
        raise NotFound(f"there is no session {shown(session)}")
    runs = [run for run in (await gateway.runs.fresh()).values() if run.session == session]
    samplers = [sampler for sampler in (await gateway.samplers.fresh()).values() if sampler.session == session]
    return Session(
        training_run_ids=[run.run for run in sorted(runs, key=lambda run: (run.created, run.run))],
        sampler_ids=[each.sampler for each in sorted(samplers, key=lambda each: (each.created, each.sampler))],
        user_metadata=metadata_of(record.user_metadata),
        display_name=record.display_name,
    )


async def search_sessions(gateway: Gateway, call: Call) -> Summaries:
    """Sessions by what is known of them."""
    asked: Search = call.body
    visible = await _visible(gateway, Scope(call.caller.tenant, everybody=call.caller.admin))
    alive = await _alive(gateway)
    found = search(asked, visible, alive, call.caller.tenant)
    kept: dict[str, list[CheckpointRecord]] = defaultdict(list)
    sessions = {run.run: run.session for run in (await gateway.runs.fresh()).values()}
    for checkpoint in await live_checkpoints(gateway):
        kept[sessions.get(checkpoint.key.run, "")].append(checkpoint)
    return Summaries(
        [_summary(session, kept.get(session.session, ()), alive) for session in found.sessions], found.cursor
    )


async def move(gateway: Gateway, call: Call) -> Answer:
    """Move a session, and with it all that belongs to it, into a project."""
    asked: Move = call.body
    session = call.path["session"]
    table = gateway.records.sessions.table
    for _ in range(TRIES):
        await gateway.records.session(call.caller, session)
        entry = await table.get(session)
        if entry is not None:
            moved = msgspec.structs.replace(entry.value, project=asked.project_id)
            if await table.update(session, moved, entry.revision) is not None:
                gateway.records.sessions.forget(session)
                await gateway.audit(call, "project_session_assigned", session=session, project=asked.project_id)
                return NOTHING
    raise TemporaryError(f"session {session} is being changed by somebody else: try again")


async def _visible(gateway: Gateway, scope: Scope) -> list[SessionRecord]:
    return [session for session in (await gateway.sessions.fresh()).values() if scope.has(session.owner)]


async def _alive(gateway: Gateway) -> frozenset[str]:
    """The sessions whose clients have been heard of."""
    oldest = time.time() - topology.HEARTBEATS.ttl
    heartbeats = await gateway.bus.table(topology.HEARTBEATS).items()
    return frozenset(entry.key[0] for entry in heartbeats if entry.value.at > oldest)


def _summary(session: SessionRecord, kept: Iterable[CheckpointRecord], alive: frozenset[str]) -> Summary:
    sizes = [checkpoint.size for checkpoint in kept]
    return Summary(
        session_id=session.session,
        created_at=at(session.created),
        owner=user_urn(session.owner),
        project_id=project_of(session),
        status=_status(session, alive),
        checkpoints_count=len(sizes),
        display_name=session.display_name,
        user_metadata=metadata_of(session.user_metadata),
        checkpoint_storage_bytes=sum(sizes),
    )


def _status(session: SessionRecord, alive: frozenset[str]) -> FinishedStatus | ActiveStatus | None:
    if session.ended is None:
        return ActiveStatus() if session.session in alive else None
    return None if session.ended == "lapsed" else FinishedStatus(Reason(session.ended), session.end_detail)


ENDPOINTS = (
    Endpoint("GET", "sessions", list_sessions),
    Endpoint("POST", "sessions/search", search_sessions, body=Search),
    Endpoint("GET", "sessions/{session}", get_session),
    Endpoint("PUT", "sessions/{session}/project", move, body=Move),
)
