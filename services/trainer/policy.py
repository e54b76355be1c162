"""What a trainer does next. Pure: plain data in, plain data out.

A run's log is executed strictly in `seq` order. Over runs, cheap operations that somebody waits for go first, then all
optimizer steps whose turn has come, then one pass over sequences of many runs, least recently served runs first, up to
a token budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from shared.contracts.training import AnyOperation, ForwardBackward, OptimStep

T = TypeVar("T")


class Offered(Enum):
    """What became of an operation that was read from the log."""

    WAITING = "waiting"
    DONE_BEFORE = "done_before"
    REPEATED = "repeated"
    """The same seq is waiting already: a producer sent it twice."""


@dataclass
class Backlog(Generic[T]):
    """One run's operations that have been read and not executed, whatever the order in which they came."""

    next_seq: int = 0
    """The seq to execute next."""
    read_up_to: int = 0
    """Place in the stream of the newest message that was read."""
    waiting: dict[int, tuple[T, int]] = field(default_factory=dict)
    """By seq: the operation and its place in the stream."""

    def offer(self, seq: int, operation: T, place: int) -> Offered:
        """Take in what was read at `place`."""
        self.read_up_to = max(self.read_up_to, place)
        if seq < self.next_seq:
            return Offered.DONE_BEFORE
        if seq in self.waiting:
            return Offered.REPEATED
        self.waiting[seq] = (operation, place)
        return Offered.WAITING

    @property
    def head(self) -> T | None:
        """The operation whose turn it is; None: it has not come yet."""
        found = self.waiting.get(self.next_seq)
        return found[0] if found else None

    def done(self) -> None:
        """The head has been executed."""
        del self.waiting[self.next_seq]
        self.next_seq += 1

    @property
    def replay_from(self) -> int:
        """Place up to which every message read has been executed: a replay may begin behind it."""
        return min((place for _, place in self.waiting.values()), default=self.read_up_to + 1) - 1


@dataclass(frozen=True)
class Turn:
    """The next thing to do: exactly one of the three is set."""

    single: str = ""
    """Run whose head is executed by itself."""
    steps: tuple[str, ...] = ()
    """Runs whose optimizer steps are applied together."""
    shared_pass: tuple[str, ...] = ()
    """Runs whose heads go through one pass."""


def tokens_of(operation: ForwardBackward) -> int:
    """Size of a pass, in tokens."""
    return sum(len(datum.tokens) for datum in operation.data)


def next_turn(heads: Mapping[str, AnyOperation], last_served: Mapping[str, float], budget: int) -> Turn | None:
    """Choose among the runs' heads. None: nothing to do.

    `last_served` orders runs in a pass; a run that is not in it comes first. A pass holds at least one run, and no
    more than `budget` tokens beyond that.
    """
    passes = {run: head for run, head in heads.items() if isinstance(head, ForwardBackward)}
    steps = tuple(run for run, head in heads.items() if isinstance(head, OptimStep))
    others = [run for run in heads if run not in passes and run not in steps]
    if others:
        return Turn(single=min(others, key=lambda run: last_served.get(run, 0.0)))
    if steps:
        return Turn(steps=steps)
    chosen: list[str] = []
    used = 0
    for run in sorted(passes, key=lambda run: last_served.get(run, 0.0)):
        size = tokens_of(passes[run])
        if chosen and used + size > budget:
            break
        chosen.append(run)
        used += size
    return Turn(shared_pass=tuple(chosen)) if chosen else None
