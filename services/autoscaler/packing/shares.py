"""Packs items that take (a share of) one GPU each onto the fewest GPUs.

`construct` goes from the scarcest and largest item to the least. It first uses GPUs that are in use anyway, tightest
fit first, then opens one GPU after the other and fills each as well as possible. Items are few kinds in large numbers,
so a content that was found once is repeated while it can be. `improve` then takes a few GPUs at a time, empties them,
and packs what was in them again in another order of preferences; it keeps what needs fewer GPUs, leaves fewer items
over, or is more unevenly filled, since GPUs that are nearly empty are those that can be given up (the measure of
Falkenauer 1996, "A hybrid grouping genetic algorithm for bin packing", Journal of Heuristics 2(1)).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from services.autoscaler.packing.fill import Candidate, fill
from services.autoscaler.packing.items import WHOLE, Kind, Room

MOST_CANDIDATES = 100
"""Kinds that are tried for one GPU."""
TRIES = 3000
"""Of the search for one GPU's content, when a packing of up to a hundred kinds is constructed."""


@dataclass
class Bin:
    """A GPU while it is packed: what was free at first, and how often each kind was put in."""

    room: Room
    content: dict[int, int] = field(default_factory=dict)
    memory: int = 0
    milli: int = 0
    """What is free now."""

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Take everything out."""
        self.content = {}
        self.memory, self.milli = self.room.memory, self.room.milli

    def put(self, number: int, kind: Kind, times: int) -> None:
        """Put a kind in."""
        self.content[number] = self.content.get(number, 0) + times
        self.memory -= times * kind.memory
        self.milli -= times * kind.milli
        assert self.memory >= 0
        assert self.milli >= 0

    @property
    def opened(self) -> bool:
        """Whether it costs a GPU."""
        return bool(self.content) and not self.room.used


class Packing:
    """Kinds with counts, and bins to put them into."""

    def __init__(self, kinds: Sequence[Kind], counts: Sequence[int], rooms: Sequence[Room]) -> None:
        self.kinds = list(kinds)
        self.left = list(counts)
        """Items of each kind that are in no bin."""
        self.bins = [Bin(room) for room in rooms]
        self.most_memory = max((room.memory for room in rooms), default=0) or 1
        self.types, self._scarcity = self._choices(rooms)

    def _choices(self, rooms: Sequence[Room]) -> tuple[list[set[str]], list[int]]:
        """For each kind, types of GPU and number of GPUs that could take it: the fewer, the earlier it is placed."""
        sorts: dict[tuple[str, int, int, bool], list[Room]] = defaultdict(list)
        for room in rooms:
            sorts[room.type, room.memory, room.milli, room.used].append(room)
        fitting = [[same for same in sorts.values() if kind.fits(same[0])] for kind in self.kinds]
        types = [{same[0].type for same in choices} for choices in fitting]
        return types, [sum(len(same) for same in choices) for choices in fitting]

    def weights(self, lean: float) -> tuple[float, float]:
        """The worth of a MiB and of a milli-GPU: `lean` 0 counts compute only, 1 memory only."""
        return lean / self.most_memory, (1 - lean) / WHOLE

    def value(self, number: int, lean: float) -> float:
        """How large a kind is."""
        per_memory, per_milli = self.weights(lean)
        kind = self.kinds[number]
        return kind.memory * per_memory + kind.milli * per_milli

    def order(self, lean: float) -> list[int]:
        """Kinds, the scarcest first, and of these the largest."""
        return sorted(
            range(len(self.kinds)), key=lambda number: (self._scarcity[number], -self.value(number, lean), number)
        )

    def candidates(self, room: Room, order: Sequence[int], lean: float) -> list[Candidate]:
        """What is left and may go into a GPU, in this order; of very many, some of all sizes."""
        left, types, type_ = self.left, self.types, room.type
        found = [number for number in order if left[number] and type_ in types[number]]
        some = found[:: -(-len(found) // MOST_CANDIDATES)] if found else found
        per_memory, per_milli = self.weights(lean)
        kinds = [(number, self.kinds[number]) for number in some]
        return [
            Candidate(number, kind.memory, kind.milli, left[number], kind.memory * per_memory + kind.milli * per_milli)
            for number, kind in kinds
        ]

    def put(self, target: Bin, number: int, times: int) -> None:
        """Move items that are left into a bin."""
        target.put(number, self.kinds[number], times)
        self.left[number] -= times
        assert self.left[number] >= 0

    def empty(self, target: Bin) -> None:
        """Take everything out of a bin; it is left again."""
        for number, times in target.content.items():
            self.left[number] += times
        target.clear()

    @property
    def opened(self) -> int:
        """GPUs that the packing takes."""
        return sum(one.opened for one in self.bins)

    def bound(self) -> int:
        """GPUs that no packing can do without: from sums, and from items of which no two share a GPU."""
        free = [one.room for one in self.bins if not one.room.used]
        if not free:
            return 0
        memory, milli = max(room.memory for room in free), max(room.milli for room in free)
        counts = list(self.left)
        for one in self.bins:
            for number, times in one.content.items():
                counts[number] += times
        demand = list(zip(counts, self.kinds, strict=True))
        used = [one.room for one in self.bins if one.room.used]
        by_memory = sum(n * kind.memory for n, kind in demand) - sum(room.memory for room in used)
        by_milli = sum(n * kind.milli for n, kind in demand) - sum(room.milli for room in used)
        # Each GPU takes at most one item of more than half of it; so do those that are in use.
        alone = max(
            sum(n for n, kind in demand if 2 * kind.memory > memory),
            sum(n for n, kind in demand if 2 * kind.milli > milli),
        )
        return max(ceil(by_memory / memory), ceil(by_milli / milli), alone - len(used), 0)


def construct(packing: Packing, lean: float, tries: int = TRIES) -> None:
    """Put as much as fits into bins."""
    order = packing.order(lean)
    _use_what_is_used(packing, order, lean)
    _open(packing, order, lean, tries)


def _use_what_is_used(packing: Packing, order: Sequence[int], lean: float) -> None:
    """Best fit into GPUs that are in use: those with equal room are looked at once."""
    per_memory, per_milli = packing.weights(lean)
    alike: dict[tuple[str, int, int], list[Bin]] = defaultdict(list)
    for one in packing.bins:
        if one.room.used:
            alike[one.room.type, one.memory, one.milli].append(one)
    for number in order:
        kind = packing.kinds[number]
        while alike and packing.left[number]:
            fitting = [
                (memory * per_memory + milli * per_milli, type_, memory, milli)
                for type_, memory, milli in alike
                if memory >= kind.memory and milli >= kind.milli and (not kind.types or type_ in kind.types)
            ]
            if not fitting:
                break
            _, type_, memory, milli = min(fitting)
            bins = alike.pop((type_, memory, milli))
            most = min(memory // kind.memory, milli // kind.milli)
            while bins and packing.left[number]:
                one = bins.pop()
                packing.put(one, number, min(most, packing.left[number]))
                alike[type_, one.memory, one.milli].append(one)
            if bins:
                alike[type_, memory, milli].extend(bins)


def _open(packing: Packing, order: Sequence[int], lean: float, tries: int) -> None:
    """Open GPU after GPU for the first kind that is left, and fill each as well as possible."""
    sorts: dict[tuple[str, int, int], list[Bin]] = defaultdict(list)
    for one in reversed(packing.bins):
        if not one.room.used and not one.content:
            sorts[one.room.type, one.room.memory, one.room.milli].append(one)
    left = list(order)
    for place, seed in enumerate(order):
        if place % 100 == 0:  # what has been placed need not be looked at any more
            left = [number for number in left if packing.left[number]]
        some = left[:: max(1, len(left) // (4 * MOST_CANDIDATES))]
        while packing.left[seed]:
            contents = [
                (*_content(packing, bins[-1].room, seed, some, lean, tries), sort)
                for sort, bins in sorts.items()
                if bins and packing.kinds[seed].fits(bins[-1].room)
            ]
            if not contents:
                break
            content, _, sort = max(contents, key=lambda found: (found[1], -found[2][1]))
            repeats = min(packing.left[number] // times for number, times in content)
            for _ in range(min(repeats, len(sorts[sort]))):
                one = sorts[sort].pop()
                for number, times in content:
                    packing.put(one, number, times)


def _content(
    packing: Packing, room: Room, seed: int, order: Sequence[int], lean: float, tries: int
) -> tuple[list[tuple[int, int]], float]:
    """What to put into an empty GPU together with one item of the kind `seed`, and its value."""
    kind = packing.kinds[seed]
    packing.left[seed] -= 1
    candidates = packing.candidates(room, order, lean)
    packing.left[seed] += 1
    content, value = fill(
        room.memory - kind.memory, room.milli - kind.milli, candidates, packing.weights(lean), tries
    )  # fmt: skip
    times = dict(content)
    times[seed] = times.get(seed, 0) + 1
    return list(times.items()), value + packing.value(seed, lean)


Score = tuple[int, int, float]


def improve(packing: Packing, rounds: int, seed: int = 0) -> None:
    """Repack a few GPUs at a time, while something is left over or more GPUs are open than the bound says."""
    draw = random.Random(seed)  # noqa: S311 - not for secrets, and the same plan every time
    bound = packing.bound()
    bins = packing.bins
    for _ in range(rounds):
        if not any(packing.left) and packing.opened <= bound:
            return
        opened = [one for one in bins if one.content]
        if not opened or (len(opened) < 2 and not any(packing.left)):
            return
        chosen = _choose(packing, opened, draw)
        _repack(packing, chosen, draw)


def _choose(packing: Packing, opened: list[Bin], draw: random.Random) -> list[Bin]:
    """A GPU that is rather empty, and some others."""
    many = min(len(opened), draw.choice((2, 3, 3, 4, 4, 5, 6, 8)))
    chosen = draw.sample(opened, many)
    if draw.random() < 0.7:
        sample = draw.sample(opened, min(len(opened), 8))
        emptiest = max(sample, key=lambda one: one.memory / packing.most_memory + one.milli / WHOLE)
        if emptiest not in chosen:
            chosen[0] = emptiest
    if draw.random() < 0.3:
        closed = [one for one in packing.bins if not one.content]
        if closed:
            chosen.append(draw.choice(closed))
    return chosen


def _score(packing: Packing, chosen: Sequence[Bin]) -> Score:
    """Less is better: items left over, GPUs opened, evenness."""
    squares = 0.0
    for one in chosen:
        memory, milli = one.room.memory - one.memory, one.room.milli - one.milli
        full = memory / packing.most_memory + milli / WHOLE
        squares += full * full
    return sum(packing.left), sum(one.opened for one in chosen), -squares


def _repack(packing: Packing, chosen: list[Bin], draw: random.Random) -> None:
    before = _score(packing, chosen)
    contents = [dict(one.content) for one in chosen]
    for one in chosen:
        packing.empty(one)
    lean = draw.choice((0.5, 0.5, draw.random()))
    _refill(packing, chosen, lean, draw)
    after = _score(packing, chosen)
    if (after[:2], after[2]) > (before[:2], before[2] + 1e-12):
        for one in chosen:
            packing.empty(one)
        for one, content in zip(chosen, contents, strict=True):
            for number, times in content.items():
                packing.put(one, number, times)


def _refill(packing: Packing, chosen: Sequence[Bin], lean: float, draw: random.Random) -> None:
    """Fill the GPUs one after the other, in a random order, those in use first."""
    shuffled = draw.sample(list(chosen), len(chosen))
    shuffled.sort(key=lambda one: not one.room.used)
    noise = {number: draw.uniform(0.8, 1.2) for number in range(len(packing.kinds)) if packing.left[number]}
    order = sorted(noise, key=lambda number: -packing.value(number, lean) * noise[number])
    for one in shuffled:
        candidates = packing.candidates(one.room, order, lean)
        if not candidates:
            continue
        if draw.random() < 0.6:
            fitting = [each for each in candidates if each.memory <= one.memory and each.milli <= one.milli]
            if not fitting:
                continue
            content, _ = _content(packing, one.room, fitting[0].kind, order, lean, 400)
        else:
            content, _ = fill(one.memory, one.milli, candidates, packing.weights(lean), 400)
        for number, times in content:
            packing.put(one, number, times)


def contents(packing: Packing) -> Mapping[str, dict[int, int]]:
    """By GPU, how often each kind is there."""
    return {one.room.gpu: one.content for one in packing.bins if one.content}
