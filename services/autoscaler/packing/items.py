"""The words of packing: items, rooms, and how much of what is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

WHOLE = 1000


class Kind(NamedTuple):
    """What an item needs of each of its GPUs. Items of one kind can be swapped."""

    memory: int
    """MiB."""
    milli: int
    gpus: int = 1
    types: frozenset[str] = frozenset()
    """Types of GPU that will do; empty: any."""

    def fits(self, room: Room) -> bool:
        """Whether it can go there at all. What has several GPUs shares none of them."""
        if self.gpus > 1 and room.used:
            return False
        return self.memory <= room.memory and self.milli <= room.milli and (not self.types or room.type in self.types)


@dataclass(frozen=True)
class Item:
    """A replica to be placed."""

    name: str
    kind: Kind


@dataclass(frozen=True)
class Room:
    """What is free on a GPU."""

    gpu: str
    node: str
    type: str
    memory: int
    """MiB."""
    milli: int = WHOLE
    used: bool = False
    """Something is there that stays, so that using the rest takes no further GPU."""

    def without(self, kind: Kind, times: int = 1) -> Room:
        """The same after something was put there."""
        memory, milli = self.memory - times * kind.memory, self.milli - times * kind.milli
        assert memory >= 0, "a GPU's memory is never promised twice"
        assert milli >= 0, "a GPU's compute is never promised twice"
        return Room(self.gpu, self.node, self.type, memory, milli, used=True)


Placement = dict[str, tuple[str, ...]]
"""GPUs by item."""
