"""Frees GPUs by moving the few replicas that are on them to GPUs in use. Pure.

A GPU is freed only if everything on it fits elsewhere now, so that each replica is replaced before it is drained, and
if the GPU makes up for the moves: while a replica starts, it holds its share twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.autoscaler.observed import WHOLE, Replica
from services.autoscaler.packing.items import Item, Room
from services.autoscaler.packing.pack import pack_all, remaining
from services.autoscaler.placing import kind_of

LOOKED_AT = 32
"""GPUs that are tried at each plan, the emptiest first."""


@dataclass(frozen=True)
class Freed:
    """A GPU that can be freed."""

    gpu: str
    moves: tuple[tuple[Replica, str], ...]
    cost: float
    """GPU seconds."""


def gpus_to_free(
    rooms: Sequence[Room],
    replicas: Sequence[Replica],
    may_move: Mapping[str, float],
    most_moves: int,
    payback_seconds: float,
) -> list[Freed]:
    """GPUs to free. `rooms` is what is free now; `may_move` has, by group, what starting a replica takes in seconds.

    Replicas of other groups, those that are pinned, and those on several GPUs stay where they are.
    """
    on: dict[str, list[Replica]] = defaultdict(list)
    for replica in replicas:
        for gpu in replica.gpus:
            on[gpu].append(replica)
    targets = {room.gpu: room for room in rooms if room.used}
    freed: list[Freed] = []
    receiving: set[str] = set()
    emptiest = sorted(targets.values(), key=lambda room: (-room.milli - room.memory / 1024, room.gpu))
    for room in emptiest[:LOOKED_AT]:
        here = on[room.gpu]
        if room.gpu in receiving or not here or len(here) > most_moves - sum(len(each.moves) for each in freed):
            continue
        cost = _cost(here, may_move)
        if cost is None or cost > payback_seconds:
            continue
        elsewhere = [target for gpu, target in targets.items() if gpu != room.gpu]
        items = [Item(replica.name, kind_of(replica.shape)) for replica in here]
        placement = pack_all(items, elsewhere, 0)
        if placement is None:
            continue
        freed.append(Freed(room.gpu, tuple((replica, placement[replica.name][0]) for replica in here), cost))
        receiving |= {gpus[0] for gpus in placement.values()}
        kinds = {item.name: item.kind for item in items}
        targets = {each.gpu: each for each in remaining(elsewhere, kinds, placement)}
    return freed


def _cost(here: Sequence[Replica], may_move: Mapping[str, float]) -> float | None:
    """GPU seconds that moving these takes; None: they must not move."""
    cost = 0.0
    for replica in here:
        movable = replica.state == "ready" and not replica.pinned and len(replica.gpus) == 1
        if not movable or replica.group not in may_move:
            return None
        cost += may_move[replica.group] * replica.shape.milli / WHOLE
    return cost
