"""Usage by hours: what goes into which, and what a window may be."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.gateway.rest.usage import (
    CheckpointUse,
    Kept,
    PromptUse,
    SampledUse,
    StorageUse,
    Tokens,
    TrainingUse,
    Whose,
    Window,
    checkpoint_uses,
    storage_uses,
    window_of,
)
from shared.contracts.tenants import UsageRecorded
from shared.errors import UserError

T0 = datetime(2026, 7, 13, tzinfo=UTC)
HOUR = 3600.0
BEGIN = T0.timestamp()
WINDOW = Window(BEGIN, BEGIN + 3 * HOUR)
ME = Whose("me", "m", "s-1")


def used(kind: str, tokens: int, begin: float, **fields: object) -> UsageRecorded:
    known = {"owner": "me", "base_model": "m", "session": "s-1", "begin": begin, "end": begin + 10, **fields}
    return UsageRecorded(kind=kind, tokens=tokens, **known)  # type: ignore[arg-type]


def test_tokens_of_an_hour_are_added_up_by_kind_model_session_and_owner() -> None:
    tokens = Tokens(WINDOW)
    for record in (
        used("training", 5, BEGIN),
        used("training", 7, BEGIN + HOUR - 1),
        used("training", 100, BEGIN + HOUR),
        used("prompt", 20, BEGIN + 1),
        used("prompt", 30, BEGIN + 1, cached=True),
        used("sampled", 1, BEGIN + 1),
        used("sampled", 2, BEGIN + 1, session="s-2"),
        used("sampled", 4, BEGIN + 1, owner="you"),
    ):
        tokens.add(record)
    assert tokens.uses() == [
        (BEGIN, ME, PromptUse(cached=True, token_count=30)),
        (BEGIN, ME, PromptUse(cached=False, token_count=20)),
        (BEGIN, ME, TrainingUse(token_count=12)),
        (BEGIN, ME._replace(owner="you"), SampledUse(token_count=4)),
        (BEGIN, ME._replace(session="s-2"), SampledUse(token_count=2)),
        (BEGIN, ME, SampledUse(token_count=1)),
        (BEGIN + HOUR, ME, TrainingUse(token_count=100)),
    ]


@pytest.mark.parametrize("begin", [BEGIN - 1, BEGIN + 3 * HOUR])
def test_tokens_outside_of_the_window_do_not_count(begin: float) -> None:
    tokens = Tokens(WINDOW)
    tokens.add(used("training", 5, begin))
    assert tokens.uses() == []


def test_a_checkpoint_counts_in_the_hour_in_which_it_was_written() -> None:
    kept = [Kept(ME, BEGIN + at, BEGIN + 9 * HOUR, 1) for at in (0.0, 10.0, HOUR, -1.0, 3 * HOUR)]
    assert checkpoint_uses(kept, WINDOW) == [
        (BEGIN, ME, CheckpointUse(count=2)),
        (BEGIN + HOUR, ME, CheckpointUse(count=1)),
    ]


def test_storage_counts_for_the_part_of_an_hour_in_which_it_was_there() -> None:
    size = 2_000_000_000
    kept = [Kept(ME, BEGIN + 0.5 * HOUR, BEGIN + 1.25 * HOUR, size), Kept(ME, BEGIN - HOUR, BEGIN + HOUR, size)]
    assert storage_uses(kept, WINDOW) == [
        (BEGIN, ME, StorageUse(gigabyte_hours=3.0)),
        (BEGIN + HOUR, ME, StorageUse(gigabyte_hours=0.5)),
    ]


def test_a_window_is_whole_hours_of_the_past_or_present() -> None:
    now = T0 + timedelta(hours=5, minutes=1)
    assert window_of(T0, T0 + timedelta(hours=2), now) == Window(BEGIN, BEGIN + 2 * HOUR)
    assert window_of(T0, T0 + timedelta(days=14), now).end == BEGIN + 14 * 24 * HOUR


@pytest.mark.parametrize(
    ("begin", "end", "says"),
    [
        (T0 + timedelta(minutes=1), T0 + timedelta(hours=2), "not at the beginning"),
        (T0, T0 + timedelta(hours=2, seconds=1), "not at the beginning"),
        (T0, T0, "not a window"),
        (T0, T0 - timedelta(hours=1), "not a window"),
        (T0, T0 + timedelta(days=14, hours=1), "not a window"),
        (T0 + timedelta(hours=7), T0 + timedelta(hours=8), "in the future"),
    ],
)
def test_another_window_is_refused_in_words(begin: datetime, end: datetime, says: str) -> None:
    with pytest.raises(UserError, match=says):
        window_of(begin, end, T0 + timedelta(hours=5))
