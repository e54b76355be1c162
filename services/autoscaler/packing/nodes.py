"""Puts items that take several whole GPUs onto nodes.

They are placed before shares: a node with a share on each GPU has no room for them, while what they leave is as good
for shares as anything. The largest goes first, onto the node that it fills best. Where sizes divide one another, as
powers of two do, this uses nodes as well as can be.
"""

from __future__ import annotations

from collections import defaultdict
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
    choices = {item.kind: sum(item.kind.fits(room) for room in rooms) for item in items}
    in_order = sorted(items, key=lambda item: (-item.kind.gpus, choices[item.kind], -item.kind.memory))
    for item in in_order:
        found = _best_node(item.kind, nodes, used, pressure)
        if found is None:
            continue
        node, gpus = found
        placement[item.name] = tuple(room.gpu for room in gpus)
        taken = set(placement[item.name])
        nodes[node] = [room for room in nodes[node] if room.gpu not in taken]
        used.add(node)
    return placement


def _best_node(
    kind: Kind, nodes: dict[str, list[Room]], used: set[str], pressure: dict[str, float]
) -> tuple[str, list[Room]] | None:
    """The node with the fewest GPUs to spare, of a type that nobody depends on if there is a choice; else the first."""
    best: tuple[tuple[float, int, bool, int, int], str, list[Room]] | None = None
    for place, (node, rooms) in enumerate(nodes.items()):
        if len(rooms) < kind.gpus:
            continue
        fitting = [room for room in rooms if kind.fits(room)]
        if len(fitting) < kind.gpus:
            continue
        fitting.sort(key=lambda room: room.memory)
        gpus = fitting[: kind.gpus]
        rank = (pressure[gpus[0].type], len(rooms) - kind.gpus, node not in used, gpus[-1].memory, place)
        if best is None or rank < best[0]:
            best = (rank, node, gpus)
    return best and (best[1], best[2])


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
