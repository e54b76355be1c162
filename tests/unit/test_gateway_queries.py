"""Pages, scopes, times and ranges, as clients write them."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from services.gateway.auth import Caller
from services.gateway.errors import NotSatisfiable
from services.gateway.rest import ranges
from services.gateway.rest.queries import Page, Scope, day_of, time_of
from shared.errors import UserError


def test_a_page_is_cut_from_the_whole_list() -> None:
    page = Page.of({"limit": "2", "offset": "3"}, 20)
    assert list(page.cut(range(10))) == [3, 4]
    assert (page.cursor(range(10)).offset, page.cursor(range(10)).total_count) == (3, 10)
    assert list(Page.of({"offset": "9"}, 20).cut(range(10))) == [9]
    assert list(Page.of({"limit": "0"}, 20).cut(range(10))) == []


@pytest.mark.parametrize("text", ["-1", "x", "", "1.5", "1e3", "²", "99999999999999999999", "10001"])
def test_a_bad_limit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="limit"):
        Page.of({"limit": text}, 20)


def test_only_an_administrator_sees_what_is_not_its_own() -> None:
    assert not Scope.of({"access_scope": "accessible"}, Caller("me")).has("you")
    assert Scope.of({"access_scope": "accessible"}, Caller("me", admin=True)).has("you")
    assert not Scope.of({}, Caller("me", admin=True)).has("you")
    with pytest.raises(UserError, match="access_scope"):
        Scope.of({"access_scope": "all"}, Caller("me"))


def test_times_have_a_zone_and_become_utc() -> None:
    assert time_of({"t": "2026-07-13T02:00:00+02:00"}, "t") == datetime(2026, 7, 13, tzinfo=UTC)
    for text in ("", "today", "2026-07-13T00:00:00"):
        with pytest.raises(UserError, match="2026-07-13T00:00:00Z"):
            time_of({"t": text}, "t")


def test_a_day_is_today_unless_it_is_named() -> None:
    assert day_of({}, date(2026, 7, 13)) == date(2026, 7, 13)
    assert day_of({"day": "2025-01-15"}, date(2026, 7, 13)) == date(2025, 1, 15)
    with pytest.raises(UserError, match="day"):
        day_of({"day": "15.1.2025"}, date(2026, 7, 13))


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-3", (0, 4)),
        ("bytes=4-", (4, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)),
        ("bytes=8-100", (8, 10)),
        ("bytes=5-4", None),
        ("bytes=0-1,3-4", None),
        ("items=0-1", None),
        ("bytes=-", None),
        ("", None),
    ],
)
def test_a_range_is_what_rfc_9110_says(header: str, span: tuple[int, int] | None) -> None:
    assert ranges.asked(header, 10) == span


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-11", "bytes=-0"])
def test_a_range_behind_the_end_is_refused(header: str) -> None:
    with pytest.raises(NotSatisfiable):
        ranges.asked(header, 10)
