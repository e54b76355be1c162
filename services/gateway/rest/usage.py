"""Usage by UTC hours: tokens from what replicas have recorded, checkpoints and their storage from when they were there.

Pure. Nothing has a price here, so every cost is None.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from msgspec import Struct

from services.gateway.rest.answers import at
from shared.contracts.tenants import UsageKind, UsageRecorded
from shared.errors import UserError

HOUR = 3600.0
GIGABYTE = 1e9
LONGEST = timedelta(days=14)


class TrainingUse(Struct, tag_field="type", tag="training", frozen=True):
    """Tokens that went through forward, or forward and backward, passes."""

    token_count: int


class PromptUse(Struct, tag_field="type", tag="sampling_prefill", frozen=True):
    """Tokens of prompts."""

    cached: bool
    token_count: int


class SampledUse(Struct, tag_field="type", tag="sampling_sample", frozen=True):
    """Tokens that were generated."""

    token_count: int


class CheckpointUse(Struct, tag_field="type", tag="checkpoint", frozen=True):
    """Checkpoints that were written, or copied."""

    count: int


class StorageUse(Struct, tag_field="type", tag="storage", frozen=True):
    """What checkpoints took up."""

    gigabyte_hours: float
    free: bool = False


Use = TrainingUse | PromptUse | SampledUse | CheckpointUse | StorageUse


class UsageEvent(Struct, frozen=True, kw_only=True):
    """One kind of use in one hour by one session, or by one owner where no session can be named."""

    bucket_start: datetime
    bucket_end: datetime
    base_model: str | None
    user_id: str | None
    user_name: str | None
    session_id: str | None
    project_id: str | None
    event_info: Use
    estimated_cost_usd: float | None = None
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None


class UsageSession(Struct, frozen=True):
    """What is said of a session beside its events."""

    user_metadata: dict[str, str] | None


class Usage(Struct, frozen=True):
    """The use in a window."""

    data: list[UsageEvent]
    sessions: dict[str, UsageSession]
    cost_data_through: datetime | None = None


class Whose(NamedTuple):
    """Who used something, and of what."""

    owner: str
    base_model: str
    session: str
    """Empty: none can be named."""
    project: str = ""
    """Empty: that of the session, if there is one."""


@dataclass(frozen=True, slots=True)
class Window:
    """Hours that are asked for, as seconds since the epoch."""

    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint while it is, or was, there."""

    whose: Whose
    begin: float
    end: float
    """When it was deleted or expired, or else now."""
    size: int
    """Bytes."""


def window_of(starting_on: datetime, ending_before: datetime, now: datetime) -> Window:
    """The window between two times. Raise `UserError` for one that is not whole hours, of the future or too long."""
    for name, time in (("starting_on", starting_on), ("ending_before", ending_before)):
        if time.timestamp() % HOUR:
            raise UserError(f"{name} {time.isoformat()} is not at the beginning of a UTC hour: round it down")
    if starting_on > now:
        raise UserError(f"starting_on {starting_on.isoformat()} is in the future: it is {now.isoformat()} now")
    if not timedelta(0) < ending_before - starting_on <= LONGEST:
        raise UserError(
            f"from {starting_on.isoformat()} to {ending_before.isoformat()} is not a window: ending_before must be "
            f"later than starting_on, by {LONGEST.days} days at most"
        )
    return Window(starting_on.timestamp(), ending_before.timestamp())


class Tokens:
    """Adds up tokens by hour."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._sums: dict[tuple[float, Whose, UsageKind, bool], int] = defaultdict(int)

    def add(self, used: UsageRecorded) -> None:
        """Count what a replica has recorded, in the hour in which it began."""
        hour = _hour(used.begin)
        if self._window.begin <= hour < self._window.end:
            whose = Whose(used.owner, used.base_model, used.session)
            self._sums[hour, whose, used.kind, used.cached] += used.tokens

    def uses(self) -> list[tuple[float, Whose, Use]]:
        """The sums, by hour, the largest of each first."""
        ordered = sorted(self._sums.items(), key=lambda entry: (entry[0][0], -entry[1], entry[0][1:]))
        return [(hour, whose, _tokens(kind, tokens, cached=cached)) for (hour, whose, kind, cached), tokens in ordered]


def checkpoint_uses(kept: Iterable[Kept], window: Window) -> list[tuple[float, Whose, Use]]:
    """How many checkpoints were written in each hour, by whom."""
    counts: dict[tuple[float, Whose], int] = defaultdict(int)
    for checkpoint in kept:
        hour = _hour(checkpoint.begin)
        if window.begin <= hour < window.end:
            counts[hour, checkpoint.whose] += 1
    return [(hour, whose, CheckpointUse(count=count)) for (hour, whose), count in sorted(counts.items())]


def storage_uses(kept: Iterable[Kept], window: Window) -> list[tuple[float, Whose, Use]]:
    """What checkpoints took up in each hour."""
    sums: dict[tuple[float, Whose], float] = defaultdict(float)
    for checkpoint in kept:
        begin, end = max(checkpoint.begin, window.begin), min(checkpoint.end, window.end)
        hour = _hour(begin)
        while hour < end:
            seconds = min(end, hour + HOUR) - max(begin, hour)
            sums[hour, checkpoint.whose] += checkpoint.size / GIGABYTE * seconds / HOUR
            hour += HOUR
    return [(hour, whose, StorageUse(gigabyte_hours=use)) for (hour, whose), use in sorted(sums.items())]


def event(hour: float, whose: Whose, use: Use, user_id: str, project: str | None) -> UsageEvent:
    """A use for clients."""
    return UsageEvent(
        bucket_start=at(hour),
        bucket_end=at(hour + HOUR),
        base_model=whose.base_model or None,
        user_id=user_id,
        user_name=whose.owner,
        session_id=whose.session or None,
        project_id=project,
        event_info=use,
    )


def _tokens(kind: UsageKind, tokens: int, *, cached: bool) -> Use:
    kinds: dict[UsageKind, Any] = {"training": TrainingUse, "sampled": SampledUse}
    if kind in kinds:
        use: Use = kinds[kind](token_count=tokens)
        return use
    return PromptUse(cached=cached, token_count=tokens)


def _hour(seconds: float) -> float:
    return math.floor(seconds / HOUR) * HOUR
