"""Puts items that take several whole GPUs onto nodes.

They are placed before shares: a node with a share on each GPU has no room for them, while what they leave is as good
for shares as anything. The largest goes first, onto the node that it fills best. Where sizes divide one another, as
powers of two do, this uses nodes as well as can be.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from services.autoscaler.packing.items import WHOLE, Item, Kind, Placement, Room


def place_on_nodes(items: Sequence[Item], rooms: Sequence[Room], wanted: Sequence[Kind]) -> Placement:
    """Place what fits. `wanted` is everything that will be placed: types that others depend on are spared."""
    pressure = _pressure(rooms, wanted)
    nodes: dict[str, list[Room]] = defaultdict(list)
    for room in rooms:
        if room.milli == WHOLE and not room.used:
            nodes[room.node].append(room)
    used = {room.node for room in rooms if room.used}
    placement: Placement = {}
    sorts = Counter((room.type, room.memory, room.milli, room.used) for room in rooms)
    examples = {(room.type, room.memory, room.milli, room.used): room for room in rooms}
    choices = {
        kind: sum(many for sort, many in sorts.items() if kind.fits(examples[sort]))
        for kind in {item.kind for item in items}
    }
    in_order = sorted(items, key=lambda item: (-item.kind.gpus, choices[item.kind], -item.kind.memory))
    alike: dict[_Sort, deque[str]] = defaultdict(deque)
    for node, free in nodes.items():
        alike[_sort(free, node in used)].append(node)
    for item in in_order:
        best = _best_sort(item.kind, alike, pressure)
        if best is None:
            continue
        node = alike[best].popleft()
        fitting = sorted((room for room in nodes[node] if item.kind.fits(room)), key=lambda room: room.memory)
        placement[item.name] = tuple(room.gpu for room in fitting[: item.kind.gpus])
        nodes[node] = [room for room in nodes[node] if room.gpu not in placement[item.name]]
        alike[_sort(nodes[node], used=True)].append(node)
    return placement


_Sort = tuple[tuple[tuple[str, int], ...], bool]
"""Type and memory of each free GPU of a node, and whether others of its GPUs are used."""


def _sort(free: Sequence[Room], used: bool) -> _Sort:  # noqa: FBT001 - part of a key
    return tuple((room.type, room.memory) for room in free), used


def _best_sort(kind: Kind, alike: dict[_Sort, deque[str]], pressure: dict[str, float]) -> _Sort | None:
    """Nodes with the fewest GPUs to spare, of a type that nobody depends on if there is a choice; else the first."""
    best: tuple[tuple[float, int, bool, int], _Sort] | None = None
    for sort, nodes in alike.items():
        free, used = sort
        able = sorted(m for type_, m in free if m >= kind.memory and (not kind.types or type_ in kind.types))
        if nodes and len(able) >= kind.gpus:
            rank = (pressure[free[0][0]], len(free) - kind.gpus, not used, able[kind.gpus - 1])
            if best is None or rank < best[0]:
                best = (rank, sort)
    return best and best[1]


def _pressure(rooms: Sequence[Room], wanted: Sequence[Kind]) -> dict[str, float]:
    """By type of GPU, how much of its compute is asked for by what can go nowhere else, in steps of a tenth."""
    supply: dict[str, int] = defaultdict(int)
    example: dict[tuple[str, int], Room] = {}
    for room in rooms:
        supply[room.type] += room.milli
        example[room.type, room.memory] = room
    demand: dict[str, int] = defaultdict(int)
    only: dict[Kind, set[str]] = {}
    for kind in wanted:
        if kind not in only:
            only[kind] = {type_ for (type_, memory) in example if memory >= kind.memory
                          and (not kind.types or type_ in kind.types)}  # fmt: skip
        if len(only[kind]) < len(supply):
            for type_ in only[kind]:
                demand[type_] += kind.milli * kind.gpus // len(only[kind])
    return {type_: round(demand[type_] / max(1, supply[type_]), 1) for type_ in supply}
