"""Usage in a window of hours, and what checkpoints take up now. Administrators see everybody's, others their own."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from msgspec import Struct

from services.gateway.auth import user_urn
from services.gateway.context import Call, Endpoint, Gateway
from services.gateway.rest.answers import metadata_of
from services.gateway.rest.queries import time_of
from services.gateway.rest.search import project_of
from services.gateway.rest.usage import (
    GIGABYTE,
    Kept,
    Tokens,
    Usage,
    UsageSession,
    Use,
    Whose,
    Window,
    checkpoint_uses,
    event,
    storage_uses,
    window_of,
)
from shared import topology
from shared.contracts.checkpoints import CheckpointRecord
from shared.contracts.sessions import SessionRecord

GONE = ("checkpoint_deleted", "checkpoint_expired")
LATE = timedelta(hours=1).total_seconds()
"""How long after its use a record of it may be stored, when the bus was away."""

SessionRecords = Mapping[tuple[str, ...], SessionRecord]


class Storage(Struct, frozen=True, kw_only=True):
    """What the checkpoints of one owner in one project take up."""

    project_id: str | None
    org_user_urn: str
    user_email: str | None = None
    user_name: str
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float | None = None


class StorageNow(Struct, frozen=True):
    """What all checkpoints take up."""

    data: list[Storage]
    effective_rate_usd_per_gigabyte_month: float | None = None


async def usage(gateway: Gateway, call: Call) -> Usage:
    """What was used in each hour of a window."""
    begin, end = time_of(call.query, "starting_on"), time_of(call.query, "ending_before")
    window = window_of(begin, end, datetime.now(UTC))
    sessions = await gateway.sessions.fresh()
    kept = [*await _kept_now(gateway, call), *await _kept_once(gateway, call, window)]
    uses = [
        *await _tokens(gateway, call, window),
        *checkpoint_uses(kept, window),
        *storage_uses([_by_project(each, sessions) for each in kept], window),
    ]
    uses.sort(key=lambda use: use[0])  # keeps the order within each hour
    data = [event(hour, whose, use, user_urn(whose.owner), _project(whose, sessions)) for hour, whose, use in uses]
    named = {each.session_id for each in data if each.session_id}
    return Usage(data, {name: _session(sessions.get((name,))) for name in sorted(named)})


async def storage_now(gateway: Gateway, call: Call) -> StorageNow:
    """What checkpoints take up now, by project and owner; of one project, if the query names it."""
    sessions = await gateway.sessions.fresh()
    runs = await _sessions_of_runs(gateway)
    sizes: dict[tuple[str | None, str], list[int]] = defaultdict(list)
    for record in await _records(gateway, call):
        whose = Whose(record.owner, record.base_model, runs.get(record.key.run, ""))
        sizes[_project(whose, sessions), record.owner].append(record.size)
    asked = call.query.get("project_id")
    return StorageNow(
        [
            _storage(project, owner, found)
            for (project, owner), found in sorted(sizes.items(), key=lambda entry: (entry[0][0] or "", entry[0][1]))
            if asked is None or project == asked
        ]
    )


async def _tokens(gateway: Gateway, call: Call, window: Window) -> list[tuple[float, Whose, Use]]:
    tokens = Tokens(window)
    async for delivery in gateway.bus.scan(topology.USED, since=window.begin, **_whose(call)):
        if delivery.time > window.end + LATE:
            break
        tokens.add(delivery.message)
    return tokens.uses()


async def _kept_now(gateway: Gateway, call: Call) -> list[Kept]:
    now = time.time()
    runs = await _sessions_of_runs(gateway)
    return [
        Kept(
            Whose(record.owner, record.base_model, runs.get(record.key.run, "")),
            record.created,
            now if record.expires is None else min(now, record.expires),
            record.size,
        )
        for record in await _records(gateway, call)
    ]


async def _kept_once(gateway: Gateway, call: Call, window: Window) -> list[Kept]:
    """Checkpoints that have been deleted since the window began, as the audit log remembers them."""
    runs = await _sessions_of_runs(gateway)
    found = []
    async for delivery in gateway.bus.scan(topology.AUDITS, since=window.begin, **_whose(call)):
        entry, about = delivery.message, delivery.message.details
        if entry.event in GONE:
            whose = Whose(entry.owner, about.get("base_model", ""), runs.get(about.get("model_id", ""), ""))
            found.append(Kept(whose, float(about.get("created", entry.at)), entry.at, int(about.get("size", 0))))
    return found


async def _records(gateway: Gateway, call: Call) -> list[CheckpointRecord]:
    records = (await gateway.checkpoints.fresh()).values()
    return [record for record in records if call.caller.admin or record.owner == call.caller.tenant]


async def _sessions_of_runs(gateway: Gateway) -> dict[str, str]:
    return {run.run: run.session for run in (await gateway.runs.fresh()).values()}


def _whose(call: Call) -> dict[str, str]:
    return {} if call.caller.admin else {"owner": call.caller.tenant}


def _by_project(kept: Kept, sessions: SessionRecords) -> Kept:
    """Storage counts for the project: a row for each session and hour would be too many."""
    whose = kept.whose._replace(session="", project=_project(kept.whose, sessions) or "")
    return Kept(whose, kept.begin, kept.end, kept.size)


def _project(whose: Whose, sessions: SessionRecords) -> str | None:
    session = sessions.get((whose.session,)) if whose.session else None
    return project_of(session) if session else whose.project or None


def _session(record: SessionRecord | None) -> UsageSession:
    return UsageSession(metadata_of(record.user_metadata) if record else None)


def _storage(project: str | None, owner: str, sizes: list[int]) -> Storage:
    return Storage(
        project_id=project,
        org_user_urn=user_urn(owner),
        user_name=owner,
        checkpoint_count=len(sizes),
        size_bytes=sum(sizes),
        size_gigabytes=sum(sizes) / GIGABYTE,
    )


ENDPOINTS = (
    Endpoint("GET", "billing/usage/events", usage),
    Endpoint("GET", "billing/usage/checkpoints/current", storage_now),
)
