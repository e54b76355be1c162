"""Packing problems: generated families, each with its seed, and snapshots of a cluster's trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from services.autoscaler.packing.items import WHOLE, Item, Kind, Room

GIB = 1024


@dataclass(frozen=True)
class Instance:
    """Items, and GPUs that are all empty."""

    name: str
    family: str
    items: tuple[Item, ...]
    rooms: tuple[Room, ...]


def rooms_of(nodes: list[tuple[int, int, str]]) -> list[Room]:
    """GPUs of nodes, each given as number of GPUs, GiB of each, and type."""
    return [
        Room(f"n{number}/{index}", f"n{number}", type_, memory * GIB)
        for number, (gpus, memory, type_) in enumerate(nodes)
        for index in range(gpus)
    ]


def _named(kinds: list[Kind], draw: random.Random) -> tuple[Item, ...]:
    draw.shuffle(kinds)
    return tuple(Item(f"r{number}", kind) for number, kind in enumerate(kinds))


def _pools(draw: random.Random, pools: int, largest: int) -> list[Kind]:
    """Replicas of a few pools, each of one shape: what a mesh of many jobs looks like."""
    kinds = []
    for _ in range(pools):
        memory = draw.choice((6, 8, 10, 12, 16, 18, 20, 24, 30, 36, 40, 48))
        milli = draw.choice((100, 150, 200, 250, 300, 350, 400, 500, 600))
        kinds += [Kind(memory * GIB, milli)] * draw.randint(1, largest)
    return kinds


def small_fractions(draw: random.Random) -> tuple[list[Kind], list[Room]]:
    """Many small shares of a few pools."""
    kinds = [
        kind
        for _ in range(draw.randint(3, 7))
        for kind in [Kind(draw.randint(3, 16) * GIB, draw.choice((50, 80, 100, 120, 150, 200, 250)))]
        * draw.randint(2, 14)
    ]
    return kinds, rooms_of([(8, 80, "H100")] * 5)


def mixed(draw: random.Random) -> tuple[list[Kind], list[Room]]:
    """Shares, whole GPUs and replicas on several GPUs."""
    kinds = _pools(draw, draw.randint(3, 6), 6)
    kinds += [Kind(80 * GIB, WHOLE)] * draw.randint(0, 3) + [Kind(70 * GIB, WHOLE, 2)] * draw.randint(0, 3)
    kinds += [Kind(80 * GIB, WHOLE, 4)] * draw.randint(0, 2) + [Kind(80 * GIB, WHOLE, 8)] * draw.randint(0, 1)
    return kinds, rooms_of([(8, 80, "H100")] * 5 + [(4, 80, "H100")] * 2)


def memory_bound(draw: random.Random) -> tuple[list[Kind], list[Room]]:
    """Shares that are large in memory and small in compute, of all sizes."""
    kinds = [Kind(draw.randint(10, 48) * GIB, draw.randint(5, 30) * 10) for _ in range(draw.randint(12, 45))]
    return kinds, rooms_of([(8, 80, "A100")] * 5)


def two_sided(draw: random.Random) -> tuple[list[Kind], list[Room]]:
    """Half of them large in memory, half in compute; every replica another size."""
    kinds = []
    for _ in range(draw.randint(12, 45)):
        large, small = draw.randint(30, 70), draw.randint(5, 35)
        memory, milli = (large, small) if draw.random() < 0.5 else (small, large)
        kinds.append(Kind(memory * 80 * GIB // 100, milli * 10))
    return kinds, rooms_of([(8, 80, "A100")] * 5)


def typed(draw: random.Random) -> tuple[list[Kind], list[Room]]:
    """GPUs of several sizes; some pools insist on types."""
    kinds = []
    choices = [frozenset[str](), frozenset[str](), frozenset({"A100"}), frozenset({"L4"}), frozenset({"A100", "H100"})]
    for _ in range(draw.randint(3, 7)):
        types = draw.choice(choices)
        memory = draw.choice((4, 6, 8, 10, 12, 20)) if "L4" in types else draw.choice((6, 8, 12, 16, 20, 30, 36))
        kinds += [Kind(memory * GIB, draw.choice((100, 150, 200, 300, 350, 450)), 1, types)] * draw.randint(1, 6)
    return kinds, rooms_of([(8, 80, "H100"), (8, 40, "A100"), (8, 40, "A100"), (4, 24, "L4"), (4, 24, "L4")])


def no_slack(draw: random.Random) -> tuple[list[Kind], list[Room]]:
    """GPUs cut into pieces that fill them exactly, both ways: the hardest there is."""
    kinds = []
    for _ in range(draw.randint(3, 10)):
        parts = draw.randint(2, 5)
        memory = sorted(draw.sample(range(1, 20), parts - 1))
        milli = sorted(draw.sample(range(1, 20), parts - 1))
        for low, high, first, last in zip([0, *memory], [*memory, 20], [0, *milli], [*milli, 20], strict=True):
            kinds.append(Kind((high - low) * 4 * GIB, (last - first) * 50))
    return kinds, rooms_of([(8, 80, "H100")] * 3)


FAMILIES: dict[str, Callable[[random.Random], tuple[list[Kind], list[Room]]]] = {
    "small fractions": small_fractions,
    "mixed": mixed,
    "memory-bound": memory_bound,
    "two-sided": two_sided,
    "typed": typed,
    "no slack": no_slack,
}


def generated(family: str, number: int) -> Instance:
    """One instance; the same for the same family and number."""
    draw = random.Random(f"{family} {number}")
    kinds, rooms = FAMILIES[family](draw)
    return Instance(f"{family} {number}", family, _named(kinds, draw), tuple(rooms))
