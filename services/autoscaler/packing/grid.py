"""Bounds what a packing costs: sizes are rounded until there are few enough kinds of items and of rooms.

Time goes with the number of kinds of items times the number of kinds of rooms. Pools have a few shapes each, so this is
seldom large; where each of thousands of replicas has a size of its own, what they need is rounded up and what is free
is rounded down, which is safe, and costs at most a step of the grid for each item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from services.autoscaler.packing.items import WHOLE, Item, Kind, Room

FINEST, COARSEST = 256, 32
"""Steps of a whole GPU."""


class Grid(NamedTuple):
    """Steps in MiB and in milli-GPUs; 1 and 1 is exact."""

    memory: int = 1
    milli: int = 1

    def up(self, kind: Kind, largest: Room) -> Kind:
        """What it needs, rounded up; what takes (nearly) all of the largest GPU still does."""
        if kind.milli == WHOLE:
            return kind  # nothing else is on that GPU, and whole ones are few kinds
        memory = min(-(-kind.memory // self.memory) * self.memory, max(kind.memory, largest.memory))
        return kind._replace(memory=memory, milli=min(WHOLE, -(-kind.milli // self.milli) * self.milli))

    def down(self, room: Room) -> Room:
        """What is free, rounded down. A GPU that nobody uses stays as it is."""
        if self.memory == 1 or not room.used:
            return room
        memory, milli = room.memory - room.memory % self.memory, room.milli - room.milli % self.milli
        return Room(room.gpu, room.node, room.type, memory, milli, used=True)


EXACT = Grid()


def grid_for(items: Sequence[Item], rooms: Sequence[Room], most_kinds: int, most_pairs: int) -> Grid:
    """The finest grid on which there are no more kinds of items, and of items times rooms; at worst the coarsest."""
    if not rooms:
        return EXACT
    largest = max(rooms, key=lambda room: room.memory)
    kinds = {item.kind for item in items}
    grid, steps = EXACT, FINEST
    while True:
        sorts = {(room.type, room.memory, room.milli, room.used) for room in map(grid.down, rooms)}
        many = len({grid.up(kind, largest) for kind in kinds})
        if (many <= most_kinds and many * len(sorts) <= most_pairs) or steps < COARSEST:
            return grid
        grid, steps = Grid(max(1, largest.memory // steps), max(1, WHOLE // steps)), steps // 2


def rounded(items: Sequence[Item], rooms: Sequence[Room], grid: Grid) -> tuple[list[Item], list[Room]]:
    """The same on a grid."""
    if grid == EXACT or not rooms:
        return list(items), list(rooms)
    largest = max(rooms, key=lambda room: room.memory)
    up = {kind: grid.up(kind, largest) for kind in {item.kind for item in items}}
    return [Item(item.name, up[item.kind]) for item in items], [grid.down(room) for room in rooms]
