"""Searching sessions: what a search asks for, and which sessions it finds. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

from services.gateway.auth import user_urn
from services.gateway.ids import shown
from services.gateway.rest.answers import DEFAULT_PROJECT, at, metadata_of
from shared.contracts.sessions import SessionRecord
from shared.errors import UserError


class Active(Struct, tag="active", frozen=True, forbid_unknown_fields=True):
    """Sessions that go on."""


class Cancelled(Struct, tag="cancelled", frozen=True, forbid_unknown_fields=True):
    """Sessions that somebody else than their client has ended. There are none here."""


class Failed(Struct, tag="failed", frozen=True, forbid_unknown_fields=True):
    """Sessions that a request has ended. There are none here: a failed request fails alone."""


class Finished(Struct, tag="client_finished", frozen=True, forbid_unknown_fields=True):
    """Sessions whose client has said that it is done."""

    reasons: Annotated[list[Literal["success", "errored", "interrupted"]], Meta(min_length=1)] | None = None
    """None: any."""


class Own(Struct, tag="own", frozen=True, forbid_unknown_fields=True):
    """The caller's sessions."""


class Accessible(Struct, tag="accessible", frozen=True, forbid_unknown_fields=True):
    """All sessions that the caller may see."""


class Users(Struct, tag="user", frozen=True, forbid_unknown_fields=True):
    """Sessions of these, as far as the caller may see them."""

    owner_urns: Annotated[list[str], Meta(min_length=1, max_length=10)]


class SearchCursor(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the next page begins: behind this session."""

    last_created_at: Annotated[datetime, Meta(tz=True)]
    last_session_id: str


class Search(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of a search."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: Annotated[str, Meta(min_length=1)] | None = None
    owner: Own | Accessible | Users = Own()
    statuses: Annotated[list[Active | Cancelled | Failed | Finished], Meta(min_length=1)] | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A page of what was found, newest first."""

    sessions: list[SessionRecord]
    cursor: SearchCursor | None


def project_of(session: SessionRecord) -> str:
    """Where a session belongs."""
    return session.project or DEFAULT_PROJECT


def search(asked: Search, visible: Iterable[SessionRecord], alive: frozenset[str], tenant: str) -> Found:
    """The sessions among `visible`, all that `tenant` may see, that a search finds.

    `alive` holds the ids of those whose clients have been heard of. Raise `UserError` for a project that none of
    `visible` belongs to.
    """
    sessions = list(visible)
    _check_projects(asked, sessions)
    found = [session for session in sessions if _matches(session, asked, alive, tenant)]
    found.sort(key=_place, reverse=True)
    if asked.cursor is not None:
        last = (asked.cursor.last_created_at, asked.cursor.last_session_id)
        found = [session for session in found if _place(session) < last]
    page = found[: asked.limit]
    more = len(found) > len(page)
    return Found(page, SearchCursor(*_place(page[-1])) if more else None)


def _place(session: SessionRecord) -> tuple[datetime, str]:
    return at(session.created), session.session


def _matches(session: SessionRecord, asked: Search, alive: frozenset[str], tenant: str) -> bool:
    return (
        _is_named(session, asked)
        and _is_owned(session, asked, tenant)
        and (asked.project_ids is None or project_of(session) in asked.project_ids)
        and (metadata_of(session.user_metadata) or {}).items() >= asked.user_metadata.items()
        and (asked.statuses is None or any(_has(session, status, alive) for status in asked.statuses))
    )


def _is_named(session: SessionRecord, asked: Search) -> bool:
    if asked.session_id is None and asked.display_name is None:
        return True
    if session.session == asked.session_id:
        return True
    name = (session.display_name or "").casefold()
    return asked.display_name is not None and all(word in name for word in asked.display_name.casefold().split())


def _is_owned(session: SessionRecord, asked: Search, tenant: str) -> bool:
    if isinstance(asked.owner, Own):
        return session.owner == tenant
    return isinstance(asked.owner, Accessible) or user_urn(session.owner) in asked.owner.owner_urns


def _has(session: SessionRecord, status: Active | Cancelled | Failed | Finished, alive: frozenset[str]) -> bool:
    if isinstance(status, Active):
        return session.ended is None and session.session in alive
    if isinstance(status, Finished):
        return session.ended not in (None, "lapsed") and (status.reasons is None or session.ended in status.reasons)
    return False


def _check_projects(asked: Search, sessions: Iterable[SessionRecord]) -> None:
    if unknown := set(asked.project_ids or ()) - {DEFAULT_PROJECT} - {project_of(session) for session in sessions}:
        raise UserError(f"there is no project {shown(min(unknown))} with sessions that you may see: leave it out")
