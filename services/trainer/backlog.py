"""One run's operations between its log and their execution, in `seq` order. Pure.

A seq may turn out to be a hole: its message came but cannot be read. As a failed operation does, it uses up its seq
and changes nothing else, so the backlog steps over it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T")


class Offered(Enum):
    """What became of an operation that was read from the log."""

    WAITING = "waiting"
    DONE_BEFORE = "done_before"
    REPEATED = "repeated"
    """The same seq is waiting already: a producer sent it twice."""
    HOLE = "hole"
    """A message that cannot be read has used up the seq."""


@dataclass
class Backlog(Generic[T]):
    """One run's operations that have been read and not executed, whatever the order in which they came."""

    next_seq: int = 0
    """The seq to execute next."""
    read_up_to: int = 0
    """Place in the stream of the newest message that was read."""
    waiting: dict[int, tuple[T | None, int]] = field(default_factory=dict)
    """By seq: the operation, None for a hole, and its place in the stream."""
    holes: set[int] = field(default_factory=set)

    def offer(self, seq: int, operation: T | None, place: int) -> Offered:
        """Take in what was read at `place`; None: a message that cannot be read. The first for a seq counts."""
        self.read_up_to = max(self.read_up_to, place)
        if seq in self.holes:
            return Offered.HOLE
        if seq < self.next_seq:
            return Offered.DONE_BEFORE
        if seq in self.waiting:
            return Offered.REPEATED
        self.waiting[seq] = (operation, place)
        if operation is None:
            self.holes.add(seq)
        self._step_over_holes()
        return Offered.WAITING

    def pass_over(self, place: int) -> None:
        """Take note of a message that belongs to no seq."""
        self.read_up_to = max(self.read_up_to, place)

    @property
    def head(self) -> T | None:
        """The operation whose turn it is; None: it has not come yet."""
        found = self.waiting.get(self.next_seq)
        return found[0] if found else None

    @property
    def is_stuck(self) -> bool:
        """Whether later operations wait for one that has not come."""
        return self.next_seq not in self.waiting and any(found is not None for found, _ in self.waiting.values())

    def skip_missing(self) -> None:
        """Give up what has not come: go on with the first operation that waits."""
        self.next_seq = min(self.waiting, default=self.next_seq)
        self._step_over_holes()

    def done(self) -> None:
        """The head has been executed."""
        del self.waiting[self.next_seq]
        self.next_seq += 1
        self._step_over_holes()

    @property
    def replay_from(self) -> int:
        """Place up to which every message read has been executed: a replay may begin behind it."""
        return min((place for _, place in self.waiting.values()), default=self.read_up_to + 1) - 1

    def _step_over_holes(self) -> None:
        while (found := self.waiting.get(self.next_seq)) is not None and found[0] is None:
            del self.waiting[self.next_seq]
            self.next_seq += 1
