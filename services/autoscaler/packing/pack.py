"""Packs items with a right of way onto GPUs: everything if it can be done, else the longest beginning of the list."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from services.autoscaler.packing.beside import place_beside
from services.autoscaler.packing.grid import EXACT, Grid, grid_for, rounded
from services.autoscaler.packing.items import Item, Kind, Placement, Room
from services.autoscaler.packing.nodes import place_on_nodes
from services.autoscaler.packing.shares import TRIES, Packing, construct, improve

EFFORT = 600
"""Rounds of improvement for a packing of up to a hundred GPUs."""
LARGE = 400
"""Kinds of items times GPUs, in hundreds, from which only one construction is tried."""
MOST_KINDS, MOST_PAIRS = 20_000, 300_000
"""Kinds of items, and these times kinds of rooms, that are packed as they are; of more, sizes are rounded (`grid`)."""
MOST_KINDS_TRIED, MOST_PAIRS_TRIED = 1_500, 60_000
"""The same while the longest beginning of a list that fits is looked for, which takes a packing for each try."""
MANY = 100
"""Kinds from which less effort also means that GPUs are filled with fewer tries."""
LEANS = (0.5, 0.35, 0.65, 0.15, 0.85)
"""What counts as large: from compute alone (0) to memory alone (1)."""


def pack(items: Sequence[Item], rooms: Sequence[Room], effort: int = EFFORT) -> Placement:
    """Place items on GPUs, opening as few as possible. What is not in the result could not be placed.

    Items are listed in the order of their right: no item is left out in favour of a later one, as far as this effort
    can tell. `rooms` is what is free; of equal GPUs the first ones are used.
    """
    return pack_all(items, rooms, effort) or _in_order(items, rooms, effort // 4)


def pack_all(
    items: Sequence[Item], rooms: Sequence[Room], effort: int = EFFORT, grid: Grid | None = None
) -> Placement | None:
    """The same, but everything or nothing. `grid` rounds sizes; None: as little as takes reasonable time."""
    if not _may_fit(items, rooms):
        return None
    if grid is None:
        grid = grid_for(items, rooms, MOST_KINDS, MOST_PAIRS)
    placement = _attempt(*rounded(items, rooms, grid), effort)
    return placement if len(placement) == len(items) else None


def _may_fit(items: Sequence[Item], rooms: Sequence[Room]) -> bool:
    """Whether there is enough in sum, of everything."""
    memory = sum(item.kind.memory * item.kind.gpus for item in items)
    milli = sum(item.kind.milli * item.kind.gpus for item in items)
    return memory <= sum(room.memory for room in rooms) and milli <= sum(room.milli for room in rooms)


def _in_order(items: Sequence[Item], rooms: Sequence[Room], effort: int) -> Placement:
    """The longest beginning of the list that can be placed, and whatever fits beside it."""
    grid = grid_for(items, rooms, MOST_KINDS_TRIED, MOST_PAIRS_TRIED)
    low, high, best = 0, len(items) - 1, Placement()
    near = 0 if grid == EXACT else len(items) // 200  # what sizes that are rounded are good for
    while low + near < high:
        middle = (low + high + 1) // 2
        placement = pack_all(items[:middle], rooms, effort, grid)
        if placement is not None:
            low, best = middle, placement
        else:
            high = middle - 1
    free = remaining(rooms, {item.name: item.kind for item in items}, best)
    return best | place_beside(items[low:], free, grid)


def remaining(rooms: Sequence[Room], kinds: Mapping[str, Kind], placement: Placement) -> list[Room]:
    """What is free after a placement."""
    by_gpu = {room.gpu: room for room in rooms}
    for name, gpus in placement.items():
        for gpu in gpus:
            by_gpu[gpu] = by_gpu[gpu].without(kinds[name])
    return list(by_gpu.values())


def _attempt(items: Sequence[Item], rooms: Sequence[Room], effort: int) -> Placement:
    wide = [item for item in items if item.kind.gpus > 1]
    placement = place_on_nodes(wide, rooms, [item.kind for item in items]) if wide else {}
    if wide:
        taken = {gpu for gpus in placement.values() for gpu in gpus}
        rooms = [room for room in rooms if room.gpu not in taken]
    return placement | _shares([item for item in items if item.kind.gpus == 1], rooms, effort)


def _shares(items: Sequence[Item], rooms: Sequence[Room], effort: int) -> Placement:
    """Try several constructions, improve the best."""
    names: dict[Kind, list[str]] = defaultdict(list)
    for item in items:
        names[item.kind].append(item.name)
    if not names:
        return {}
    kinds = sorted(names, key=lambda kind: (-kind.milli, -kind.memory, sorted(kind.types)))
    counts = [len(names[kind]) for kind in kinds]
    best: Packing | None = None
    large = len(kinds) * len(rooms) > LARGE * 100
    tries = TRIES * 100 // max(100, len(kinds))
    if len(kinds) > MANY:
        tries = max(20, tries * effort // EFFORT)
    for lean in LEANS[: 1 if large or not effort else None]:
        packing = Packing(kinds, counts, rooms)
        construct(packing, lean, tries)
        if best is None or (sum(packing.left), packing.opened) < (sum(best.left), best.opened):
            best = packing
        if not any(best.left) and best.opened <= best.bound():
            break
    assert best is not None
    improve(best, effort * 100 // max(100, len(rooms)))
    return _named(best, {kind: list(reversed(names[kind])) for kind in kinds})


def _named(packing: Packing, names: dict[Kind, list[str]]) -> Placement:
    placement: Placement = {}
    for one in packing.bins:
        for number, times in one.content.items():
            for _ in range(times):
                placement[names[packing.kinds[number]].pop()] = (one.room.gpu,)
    return placement
