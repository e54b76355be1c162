"""Which sessions a search finds, and that its pages hold each of them once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker.types import SessionSearchRequest

from services.gateway.auth import user_urn
from services.gateway.rest.search import Search, search
from shared.contracts.sessions import SessionRecord
from shared.errors import UserError


def session(name: str, created: float = 0.0, owner: str = "me", **fields: Any) -> SessionRecord:
    return SessionRecord(session=name, owner=owner, created=created, **fields)


ALL = [
    session("s-1", 1, display_name="Nightly Math run", user_metadata={"team": "a", "n": 3}),
    session("s-2", 2, project="p", ended="success", user_metadata={"team": "a"}),
    session("s-3", 3, project="p", ended="errored", display_name="other"),
    session("s-4", 4, ended="lapsed"),
    session("s-5", 5, owner="you", display_name="nightly"),
]
ALIVE = frozenset({"s-1", "s-5"})


def found(**asked: Any) -> list[str]:
    # As the client writes it, so that a difference between its types and ours shows.
    body = SessionSearchRequest.model_validate(asked).model_dump_json(exclude_none=True)
    return [each.session for each in search(msgspec.json.decode(body, type=Search), ALL, ALIVE, "me").sessions]


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, ["s-4", "s-3", "s-2", "s-1"]),
        ({"owner": {"type": "accessible"}}, ["s-5", "s-4", "s-3", "s-2", "s-1"]),
        ({"owner": {"type": "user", "owner_urns": [user_urn("you")]}}, ["s-5"]),
        ({"session_id": "s-2"}, ["s-2"]),
        ({"session_id": "s-"}, []),
        ({"display_name": "math NIGHT"}, ["s-1"]),
        ({"display_name": "math absent"}, []),
        ({"display_name": "other", "session_id": "s-1"}, ["s-3", "s-1"]),
        ({"user_metadata": {"team": "a"}}, ["s-2", "s-1"]),
        ({"user_metadata": {"team": "a", "n": "3"}}, ["s-1"]),
        ({"user_metadata": {"team": "A"}}, []),
        ({"project_ids": ["p"]}, ["s-3", "s-2"]),
        ({"project_ids": ["default"]}, ["s-4", "s-1"]),
        ({"statuses": [{"type": "active"}]}, ["s-1"]),
        ({"statuses": [{"type": "client_finished"}]}, ["s-3", "s-2"]),
        ({"statuses": [{"type": "client_finished", "reasons": ["errored"]}, {"type": "active"}]}, ["s-3", "s-1"]),
        ({"statuses": [{"type": "failed"}, {"type": "cancelled"}]}, []),
    ],
)
def test_a_search_finds(asked: dict[str, Any], names: list[str]) -> None:
    assert found(**asked) == names


def test_a_project_without_visible_sessions_is_refused() -> None:
    with pytest.raises(UserError, match="'q'"):
        found(project_ids=["p", "q"])


@pytest.mark.parametrize(
    "body",
    [
        {"limit": 0},
        {"limit": 201},
        {"statuses": []},
        {"display_name": ""},
        {"owner": {"type": "nobody"}},
        {"owner": {"type": "user", "owner_urns": []}},
        {"cursor": {"last_created_at": "2026-07-13T00:00:00", "last_session_id": "s-1"}},
        {"sessionid": "s-1"},
    ],
)
def test_what_no_search_may_ask_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(body), type=Search)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3).map(float), max_size=12), st.integers(1, 5))
def test_pages_hold_each_session_once_newest_first(created: list[float], limit: int) -> None:
    sessions = [session(f"s-{number}", at) for number, at in enumerate(created)]
    seen: list[SessionRecord] = []
    cursor = None
    while True:
        page = search(Search(limit=limit, cursor=cursor), sessions, frozenset(), "me")
        seen += page.sessions
        if page.cursor is None:
            break
        assert len(page.sessions) == limit
        cursor = msgspec.json.decode(msgspec.json.encode(page.cursor), type=type(page.cursor))
    assert sorted(each.session for each in seen) == sorted(each.session for each in sessions)
    assert [each.created for each in seen] == sorted(created, reverse=True)
