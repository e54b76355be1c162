"""What a pod of ours carries, so that what there is can be seen in the cluster alone; and small readers of objects."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from shared.contracts.base import Strict

Object = dict[str, Any]
"""An object of Kubernetes as JSON has it. The client's classes are not used: they drop fields that they do not know,
and a newer cluster has such."""

MANAGER = "openrl-autoscaler"
MANAGED_BY = "app.kubernetes.io/managed-by"
GROUP = "openrl.dev/group"
SHARED = "openrl.dev/shared-claim"
"""Label of claims that several pods use: "true"."""
PLACED = "openrl.dev/placed"
REASON = "openrl.dev/reason"
PINNED = "openrl.dev/pinned"
"""Set to "true" by people: the replica stays where it is."""
OURS = f"{MANAGED_BY}={MANAGER}"
"""Label selector of what the autoscaler makes."""


class Placed(Strict):
    """Where a replica was put, and what it was given: the annotation `openrl.dev/placed`."""

    gpus: list[str]
    node: str
    memory_gib: float
    milli: int
    types: list[str] = []
    replaces: str = ""
    claim: str = ""
    """Its ResourceClaim, in mode dra."""


def name_of(found: Mapping[str, Any]) -> str:
    """Its name."""
    return str(found["metadata"]["name"])


def labels_of(found: Mapping[str, Any]) -> Mapping[str, str]:
    """Its labels; none is none."""
    return found["metadata"].get("labels") or {}


def annotations_of(found: Mapping[str, Any]) -> Mapping[str, str]:
    """Its annotations; none is none."""
    return found["metadata"].get("annotations") or {}


def condition(found: Mapping[str, Any], kind: str) -> Mapping[str, str]:
    """The condition of that type in its status; empty if it has none."""
    conditions = (found.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one.get("type") == kind), {})


def seconds(stamp: str | None) -> float:
    """Seconds since 1970 of a time as Kubernetes writes it."""
    if not stamp:
        return 0.0
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def stamp(at: float) -> str:
    """A time with microseconds, as leases have it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def quantity(text: object) -> float:
    """A quantity such as `80Gi`, `81559Mi` or `500m`; 0 for what is none."""
    try:
        return float(parse_quantity(text))
    except ValueError:
        return 0.0
