"""What stands behind the question mark: pages, scopes, times. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TypeVar

from services.gateway.auth import Caller
from services.gateway.ids import shown
from services.gateway.rest.answers import Cursor
from shared.errors import UserError

T = TypeVar("T")

MOST = 10_000
"""Entries of one page."""
OWNED, ACCESSIBLE = "owned", "accessible"


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for."""

    limit: int
    offset: int

    @classmethod
    def of(cls, query: Mapping[str, str], limit: int) -> Page:
        """What a query asks for; `limit` unless it says otherwise. Raise `UserError`."""
        page = cls(_whole(query, "limit", limit), _whole(query, "offset", 0))
        if page.limit > MOST:
            raise UserError(f"limit {page.limit} is too much: {MOST} at most, and the next page with offset")
        return page

    def cut(self, entries: Sequence[T]) -> Sequence[T]:
        """What of a whole list is on the page."""
        return entries[self.offset : self.offset + self.limit]

    def cursor(self, entries: Sequence[object]) -> Cursor:
        """Where the page stands in a whole list."""
        return Cursor(offset=self.offset, limit=self.limit, total_count=len(entries))


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose things are asked for."""

    tenant: str
    everybody: bool

    @classmethod
    def of(cls, query: Mapping[str, str], caller: Caller) -> Scope:
        """What a query asks for: the caller's own, or what the caller may see. Raise `UserError`."""
        asked = query.get("access_scope", OWNED)
        if asked not in (OWNED, ACCESSIBLE):
            raise UserError(f"access_scope {shown(asked)} is not known: give {OWNED} or {ACCESSIBLE}")
        return cls(caller.tenant, everybody=asked == ACCESSIBLE and caller.admin)

    def has(self, owner: str) -> bool:
        """Whether something of this owner belongs to what is asked for."""
        return self.everybody or owner == self.tenant


def day_of(query: Mapping[str, str], today: date) -> date:
    """The UTC day that a query names; without one, today. Raise `UserError`."""
    text = query.get("day")
    if not text:
        return today
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UserError(f"day {shown(text)} is no date: give it as 2026-07-13") from None


def time_of(query: Mapping[str, str], name: str) -> datetime:
    """A time that a query must give, with its zone. Raise `UserError`."""
    text = query.get(name, "")
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{name} {shown(text)} is no time: give it as 2026-07-13T00:00:00Z") from None
    if found.tzinfo is None:
        raise UserError(f"{name} {shown(text)} has no time zone: give it as 2026-07-13T00:00:00Z")
    return found.astimezone(UTC)


def _whole(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise UserError(f"{name} {shown(text)} cannot be used: give a whole number from 0")
    return int(text)
