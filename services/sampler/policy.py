"""Which policy leaves when another one needs its place. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from shared.contracts.policies import PolicyRef


def victim(last_used: Mapping[PolicyRef, float], in_use: Collection[PolicyRef]) -> PolicyRef | None:
    """The least recently used policy that no request names now; None: all are in use."""
    free = [policy for policy in last_used if policy not in in_use]
    return min(free, key=lambda policy: last_used[policy], default=None)
