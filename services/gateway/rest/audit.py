"""The audit log of a day."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import Any

from msgspec import Struct

from services.gateway.context import Call, Endpoint, Gateway
from services.gateway.ids import shown
from services.gateway.rest.answers import at
from services.gateway.rest.queries import day_of
from shared import topology
from shared.contracts.tenants import Audited
from shared.errors import UserError

KINDS = {"all": "", "checkpoints": "checkpoint_", "projects": "project_", "teams": "team_",
         "organizations": "organization_"}  # fmt: skip
"""What events of each kind begin with."""
LATE = timedelta(minutes=10)
"""How long after an event its entry may be stored, when the bus was away."""


class AuditEntry(Struct, frozen=True):
    """Something that somebody did, or was refused."""

    timestamp: datetime
    event: str
    event_details: dict[str, Any]
    model_id: str | None
    tinker_path: str | None
    purpose: str | None


class AuditLog(Struct, frozen=True):
    """Entries in the order of time."""

    entries: list[AuditEntry]


async def read(gateway: Gateway, call: Call) -> AuditLog:
    """The entries of a UTC day: for administrators everybody's, for others what they did themselves."""
    kind = call.query.get("event_type", "all")
    if kind not in KINDS:
        raise UserError(f"event_type {shown(kind)} is not known: give one of {', '.join(KINDS)}")
    day = day_of(call.query, datetime.now(UTC).date())
    begin = datetime.combine(day, time(), UTC)
    whose = {} if call.caller.admin else {"owner": call.caller.tenant}
    found: list[Audited] = []
    async for delivery in gateway.bus.scan(topology.AUDITS, since=begin.timestamp(), **whose):
        entry = delivery.message
        if delivery.time > (begin + timedelta(days=1) + LATE).timestamp():
            break
        if at(entry.at).date() == day and entry.event.startswith(KINDS[kind]):
            found.append(entry)
    return AuditLog([_told(entry) for entry in sorted(found, key=lambda entry: entry.at)])


def _told(entry: Audited) -> AuditEntry:
    details = {"tenant": entry.owner, **entry.details}
    return AuditEntry(at(entry.at), entry.event, details, *(_text(details, name) for name in _PLAIN))


_PLAIN = ("model_id", "tinker_path", "purpose")


def _text(details: dict[str, Any], name: str) -> str | None:
    value = details.get(name)
    return value if isinstance(value, str) else None


ENDPOINTS = (Endpoint("GET", "audit", read),)
