"""Packing when not everything fits, and when hardly two replicas are alike."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from services.autoscaler.packing import pack as packing
from services.autoscaler.packing.beside import place_beside
from services.autoscaler.packing.grid import EXACT, Grid, grid_for, rounded
from services.autoscaler.packing.items import WHOLE, Item, Kind, Placement, Room
from services.autoscaler.packing.pack import pack

MEMORY = 80 * 1024
shares = some.tuples(some.integers(1, MEMORY), some.integers(1, WHOLE)).map(lambda pair: Kind(*pair))
wide = some.builds(lambda gpus, memory: Kind(memory, WHOLE, gpus), some.integers(2, 4), some.integers(1, MEMORY))
kinds = some.lists(some.one_of(shares, wide), min_size=1, max_size=30)


def items_of(found: list[Kind]) -> list[Item]:
    return [Item(f"r{number}", kind) for number, kind in enumerate(found)]


def rooms_of(nodes: int, gpus: int = 4, used: int = 0) -> list[Room]:
    rooms = [Room(f"n{node}/{gpu}", f"n{node}", "H100", MEMORY) for node in range(nodes) for gpu in range(gpus)]
    return [room.without(Kind(7_777, 333)) if number < used else room for number, room in enumerate(rooms)]


def check(items: list[Item], rooms: list[Room], placement: Placement) -> None:
    """Nobody gets more than there is, and several GPUs are whole ones of one node."""
    by_name = {item.name: item.kind for item in items}
    free = {room.gpu: room for room in rooms}
    memory: Counter[str] = Counter()
    milli: Counter[str] = Counter()
    for name, gpus in placement.items():
        kind = by_name[name]
        assert len(set(gpus)) == kind.gpus
        assert len({free[gpu].node for gpu in gpus}) == 1
        for gpu in gpus:
            memory[gpu] += kind.memory
            milli[gpu] += kind.milli
            assert kind.gpus == 1 or not free[gpu].used
    assert all(memory[gpu] <= room.memory and milli[gpu] <= room.milli for gpu, room in free.items())


@given(kinds, some.integers(0, 6))
@settings(deadline=None, max_examples=60)
def test_what_is_placed_beside_a_packing_fits_and_the_rest_would_not(found: list[Kind], used: int) -> None:
    items, rooms = items_of(found), rooms_of(2, used=used)
    placement = place_beside(items, rooms)
    check(items, rooms, placement)
    by_name = {item.name: item.kind for item in items}
    left = packing.remaining(rooms, by_name, placement)
    for item in items:
        if item.name not in placement:
            nodes = Counter(room.node for room in left if item.kind.fits(room))
            assert all(many < item.kind.gpus for many in nodes.values())


@given(kinds, some.integers(0, 6), some.sampled_from([Grid(320, 4), Grid(2560, 31)]))
@settings(deadline=None, max_examples=60)
def test_rounded_sizes_never_promise_what_is_not_there(found: list[Kind], used: int, grid: Grid) -> None:
    items, rooms = items_of(found), rooms_of(2, used=used)
    check(items, rooms, packing.pack_all(items, rooms, 20, grid) or {})
    check(items, rooms, place_beside(items, rooms, grid))
    larger, smaller = rounded(items, rooms, grid)
    assert all(one.kind.memory >= item.kind.memory for one, item in zip(larger, items, strict=True))
    assert all(one.memory <= room.memory for one, room in zip(smaller, rooms, strict=True))


def test_sizes_stay_as_they_are_while_there_are_few() -> None:
    items = items_of([Kind(1000, 100)] * 500 + [Kind(3333, 77)] * 500)
    assert grid_for(items, rooms_of(100), 10, 100) == EXACT


def test_sizes_are_rounded_until_there_are_few_enough() -> None:
    items = items_of([Kind(5_000 + 7 * number, 50 + number % 400) for number in range(3_000)])
    grid = grid_for(items, rooms_of(100), 1_500, 60_000)
    larger, _ = rounded(items, rooms_of(100), grid)
    assert grid != EXACT
    assert len({item.kind for item in larger}) <= 1_500


def test_a_replica_of_nearly_a_whole_gpu_still_fits_when_sizes_are_rounded() -> None:
    items = items_of([Kind(MEMORY - 1, 999)])
    assert packing.pack_all(items, rooms_of(1), 0, Grid(2560, 31)) is not None


@pytest.mark.parametrize("rounding", [False, True])
def test_of_too_many_the_first_are_placed_and_then_what_fits(rounding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves for twice the GPUs that there are: the first get places, and small ones come in where there is room."""
    if rounding:
        monkeypatch.setattr(packing, "MOST_KINDS_TRIED", 1)
    halves = [Kind(30 * 1024, 450)] * 32
    items = items_of([*halves, *[Kind(1024 + number, 50) for number in range(8)]])
    placement = pack(items, rooms_of(2))
    check(items, rooms_of(2), placement)
    first = [item.name for item in items[:16]]
    assert set(first) <= placement.keys()
    assert {item.name for item in items[32:]} <= placement.keys()
