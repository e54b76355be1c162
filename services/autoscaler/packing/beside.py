"""Places items one after the other where they fit most tightly, without moving any: for what comes after a packing.

GPUs with equal room are looked at once, and what is no smaller than something that did not fit is not tried again, so
that thousands of items that find no room take little time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from services.autoscaler.packing.grid import EXACT, Grid
from services.autoscaler.packing.items import WHOLE, Item, Kind, Placement, Room

_Sort = tuple[bool, str, int, int]
"""Used or not, type, memory, compute: of rooms that are alike."""


def place_beside(items: Iterable[Item], rooms: Sequence[Room], grid: Grid = EXACT) -> Placement:
    """Place what fits, in this order. GPUs in use come first, then those where the least is left over."""
    free = _Free(rooms, grid)
    hopeless: dict[tuple[int, frozenset[str]], list[Kind]] = defaultdict(list)
    placement: Placement = {}
    for item in items:
        kind = item.kind
        smaller = hopeless[kind.gpus, kind.types]
        if any(kind.memory >= one.memory and kind.milli >= one.milli for one in smaller):
            continue
        gpus = free.take_one(kind) if kind.gpus == 1 else free.take_several(kind)
        if gpus:
            placement[item.name] = gpus
        else:
            smaller[:] = [one for one in smaller if one.memory < kind.memory or one.milli < kind.milli]
            smaller.append(kind)
    return placement


class _Free:
    """What is free, by sort and by node."""

    def __init__(self, rooms: Sequence[Room], grid: Grid) -> None:
        self._grid = grid
        self._most = max((room.memory for room in rooms), default=0) or 1
        self._alike: dict[_Sort, dict[str, Room]] = defaultdict(dict)
        self._nodes: dict[str, dict[str, Room]] = defaultdict(dict)
        """Whole GPUs that nobody uses, for items that take several."""
        for room in rooms:
            self._add(room)

    def _add(self, room: Room) -> None:
        room = self._grid.down(room)
        if room.memory and room.milli:
            self._alike[_sort(room)][room.gpu] = room
        if room.milli == WHOLE and not room.used:
            self._nodes[room.node][room.gpu] = room

    def _take(self, room: Room, kind: Kind) -> None:
        alike = self._alike[_sort(room)]
        del alike[room.gpu]
        if not alike:
            del self._alike[_sort(room)]
        self._nodes.get(room.node, {}).pop(room.gpu, None)
        self._add(room.without(kind))

    def take_one(self, kind: Kind) -> tuple[str, ...]:
        """A GPU with room for it; nothing if there is none."""
        fitting = [sort for sort in self._alike if _fits(kind, sort)]
        if not fitting:
            return ()
        best = min(fitting, key=lambda sort: (not sort[0], sort[2] / self._most + sort[3] / WHOLE, sort[1:]))
        room = next(iter(self._alike[best].values()))
        self._take(room, kind)
        return (room.gpu,)

    def take_several(self, kind: Kind) -> tuple[str, ...]:
        """GPUs of the node that is filled best by it; nothing if there is none."""
        able = {node: [room for room in here.values() if kind.fits(room)] for node, here in self._nodes.items()}
        able = {node: fitting for node, fitting in able.items() if len(fitting) >= kind.gpus}
        if not able:
            return ()
        node = min(able, key=lambda node: (len(self._nodes[node]), len(able[node])))
        chosen = sorted(able[node], key=lambda room: room.memory)[: kind.gpus]
        for room in chosen:
            self._take(room, kind)
        return tuple(room.gpu for room in chosen)


def _sort(room: Room) -> _Sort:
    return room.used, room.type, room.memory, room.milli


def _fits(kind: Kind, sort: _Sort) -> bool:
    _, type_, memory, milli = sort
    return kind.memory <= memory and kind.milli <= milli and (not kind.types or type_ in kind.types)
