"""Whose request begins next: owners in turn, by what their requests cost. Pure.

Start-time fair queueing (Goyal, Vin and Cheng 1996, "Start-time fair queueing", SIGCOMM): each owner has a clock that
goes forward by the cost of each of its requests that begins, and the owner whose clock is furthest behind is next. An
owner that comes back begins at the clock of the last request that began, so nobody saves up turns by being away; one
whose clock is ahead of that keeps it, so nobody gains by coming and going. Over any time in which two owners both have
something waiting, what they were given differs by at most their largest requests, however many requests each has.
Requests of one owner begin in the order of their arrival.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Things that wait, by owner. They are told apart by identity."""

    def __init__(self, owner: Callable[[T], str], cost: Callable[[T], float]) -> None:
        self._owner, self._cost = owner, cost
        self._lines: dict[str, dict[int, tuple[int, T]]] = {}
        """By owner and identity: number of arrival, and the thing."""
        self._clocks: dict[str, float] = {}
        self._now = 0.0
        """Clock of the owner of what began last, before it began."""
        self._arrived = 0

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for line in self._lines.values() for _, item in line.values())

    def add(self, item: T) -> None:
        """Let a thing wait."""
        self._arrived += 1
        self._lines.setdefault(self._owner(item), {})[id(item)] = self._arrived, item

    def remove(self, item: T) -> None:
        """Forget a thing, at no cost to its owner. One that does not wait is ignored."""
        owner = self._owner(item)
        line = self._lines.get(owner, {})
        line.pop(id(item), None)
        if not line:
            self._lines.pop(owner, None)

    def in_turn(self) -> Iterator[T]:
        """All that waits, in the order in which it would begin if nothing else came."""
        lines = {owner: iter(line.values()) for owner, line in self._lines.items()}
        heads = [(self._clock(owner), *next(line), owner) for owner, line in lines.items()]
        heap = [(clock, arrived, owner, item) for clock, arrived, item, owner in heads]
        heapq.heapify(heap)
        while heap:
            clock, _, owner, item = heap[0]
            yield item
            following = next(lines[owner], None)
            if following is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (clock + self._cost(item), following[0], owner, following[1]))

    def take(self, items: Iterable[T]) -> None:
        """Some begin, in the order of `in_turn`: charge their owners."""
        for item in items:
            owner = self._owner(item)
            self._now = self._clock(owner)
            self._clocks[owner] = self._now + self._cost(item)
            self.remove(item)
        self._clocks = {owner: clock for owner, clock in self._clocks.items() if clock > self._now}

    def _clock(self, owner: str) -> float:
        return max(self._now, self._clocks.get(owner, 0.0))
