"""Packs items with a right of way onto GPUs: everything if it can be done, else the longest beginning of the list."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from services.autoscaler.packing.items import Item, Kind, Placement, Room
from services.autoscaler.packing.nodes import place_on_nodes
from services.autoscaler.packing.shares import Packing, construct, improve

EFFORT = 2000
"""Rounds of improvement for a packing of up to a hundred GPUs."""
LARGE = 400
"""Kinds of items times GPUs, in hundreds, from which only one construction is tried."""
LEANS = (0.5, 0.35, 0.65, 0.15, 0.85)
"""What counts as large: from compute alone (0) to memory alone (1)."""


def pack(items: Sequence[Item], rooms: Sequence[Room], effort: int = EFFORT) -> Placement:
    """Place items on GPUs, opening as few as possible. What is not in the result could not be placed.

    Items are listed in the order of their right: no item is left out in favour of a later one, as far as this effort
    can tell. `rooms` is what is free; of equal GPUs the first ones are used.
    """
    return pack_all(items, rooms, effort) or _in_order(items, rooms, effort)


def pack_all(items: Sequence[Item], rooms: Sequence[Room], effort: int = EFFORT) -> Placement | None:
    """The same, but everything or nothing."""
    if not _may_fit(items, rooms):
        return None
    placement = _attempt(items, rooms, effort)
    return placement if len(placement) == len(items) else None


def _may_fit(items: Sequence[Item], rooms: Sequence[Room]) -> bool:
    """Whether there is enough in sum, of everything."""
    memory = sum(item.kind.memory * item.kind.gpus for item in items)
    milli = sum(item.kind.milli * item.kind.gpus for item in items)
    return memory <= sum(room.memory for room in rooms) and milli <= sum(room.milli for room in rooms)


def _in_order(items: Sequence[Item], rooms: Sequence[Room], effort: int) -> Placement:
    """The longest beginning of the list that can be placed, and whatever fits beside it."""
    low, high, best = 0, len(items) - 1, Placement()
    while low < high:
        middle = (low + high + 1) // 2
        placement = pack_all(items[:middle], rooms, effort)
        if placement is not None:
            low, best = middle, placement
        else:
            high = middle - 1
    free = remaining(rooms, {item.name: item.kind for item in items}, best)
    hopeless: set[Kind] = set()
    for item in items[low:]:
        placement = None if item.kind in hopeless else pack_all([item], free, 0)
        if placement is None:
            hopeless.add(item.kind)
        else:
            free = remaining(free, {item.name: item.kind}, placement)
            best |= placement
    return best


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
    for lean in LEANS[: 1 if large or not effort else None]:
        packing = Packing(kinds, counts, rooms)
        construct(packing, lean, tries=300 if large else 3000)
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
