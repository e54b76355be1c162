"""Which groups to ask for now: a bounded number of them is out at a time. Plain data, no waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from shared.contracts.episodes import GroupKey


class Window:
    """Groups to ask for, in order, and those that are out.

    What one job has in the queues is bounded by it, so other jobs' groups come soon behind.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: deque[GroupKey] = deque()
        self._out: dict[GroupKey, float] = {}
        """When it was asked for, in the caller's seconds."""

    def add(self, keys: Iterable[GroupKey]) -> None:
        """Ask for these too, as soon as there is room."""
        self._waiting.extend(keys)

    def next(self, now: float, wanted: Callable[[GroupKey], bool]) -> list[GroupKey]:
        """What to ask for now. What is no longer `wanted`, since it has come all the same, is left out."""
        found = []
        while self._waiting and len(self._out) < self._size:
            key = self._waiting.popleft()
            if wanted(key):
                self._out[key] = now
                found.append(key)
        return found

    def back(self, key: GroupKey) -> None:
        """A group has come back."""
        self._out.pop(key, None)

    def overdue(self, now: float, patience: float) -> list[GroupKey]:
        """Groups that have been out for longer than `patience`; they count as out no more."""
        late = [key for key, asked in self._out.items() if now - asked > patience]
        for key in late:
            del self._out[key]
        return late
