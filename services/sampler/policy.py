"""Which policies leave when others want their places. Pure: time is passed in.

Policies that are asked for and not in memory stand in line. For each that has no free place one of those in memory is
to leave: first one that no request uses, the least recently used; else the one whose term ended first. It is closed:
what it has begun goes on, what comes for it waits, so it comes to its end however many ask for it. When it is empty it
leaves, and joins the line again if somebody waits for it. So policies that share too few places take turns, and all
that waits for one is served together in its turn.

A turn is never shorter than a term: `TERM` times as long as it took to fetch and load the policy. Loading then takes at
most one part in `TERM + 1` of the time of a place, also where two tenants ask one request after the other in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.contracts.policies import PolicyRef

TERM = 4.0


@dataclass
class Held:
    """A policy in memory."""

    used: float
    """When a request last began or ended."""
    until: float
    """End of its term: it stays until then even if others want its place."""
    users: int = 0
    """Requests that have begun and not ended."""


@dataclass(frozen=True)
class Leaving:
    """Who makes room."""

    now: tuple[PolicyRef, ...] = ()
    """Not in use: leave at once."""
    closed: frozenset[PolicyRef] = frozenset()
    """In use: leave when what has begun has ended, and nothing more begins."""
    again: float | None = None
    """When to ask again, because terms end; None: when something changes."""


def leaving(held: Mapping[PolicyRef, Held], wanted: int, now: float) -> Leaving:
    """Choose up to `wanted` policies that make room."""
    if wanted <= 0:
        return Leaving()
    free = [policy for policy, its in held.items() if its.until <= now]
    chosen = sorted(free, key=lambda policy: _turn(held[policy]))[:wanted]
    idle = tuple(policy for policy in chosen if not held[policy].users)
    ends = [its.until for its in held.values() if its.until > now]
    again = min(ends, default=None) if len(chosen) < wanted else None
    return Leaving(idle, frozenset(chosen).difference(idle), again)


def _turn(held: Held) -> tuple[bool, float]:
    return (True, held.until) if held.users else (False, held.used)
