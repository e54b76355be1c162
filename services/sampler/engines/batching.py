"""Decides which requests begin, which prompts are computed together, and how large the cache is.

Pure functions over plain numbers. Requests begin in the order in which they are given (`fair` decides it): a large one
at the head is waited for, so none starves. The cache is a rectangle, rows times the longest row, and every row is
admitted with all the positions that it may ever need: what has begun always has room to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 16
"""Positions are reserved and attended to in multiples of this, so that few different shapes occur."""

FIRST_ROWS = 8
FIRST_LENGTH = 64
_TOLERATED_PADDING = 64
"""Padding tokens that cost less than another pass over the weights."""


@dataclass(frozen=True)
class Waiting:
    """A request that has not begun."""

    rows: int
    """Sequences to generate; 0 for one that only scores its prompt."""
    prompt: int
    """Tokens of the prompt."""
    length: int
    """Positions that each row may need, a multiple of `BLOCK`."""
    isolated: bool = False


@dataclass(frozen=True)
class Running:
    """What is being generated."""

    rows: int = 0
    length: int = 0
    """Positions promised to the longest row."""
    isolated: bool = False


@dataclass(frozen=True)
class Room:
    """What may be in use at the same time."""

    rows: int
    positions: int
    """Rows times the longest row's positions."""
    prompt_tokens: int
    """Prompt tokens computed between two decoding steps; a single longer prompt is computed nevertheless."""


@dataclass(frozen=True)
class Shape:
    """Rows and positions of the cache."""

    rows: int = 0
    length: int = 0


def padded(length: int) -> int:
    """Round up to a multiple of `BLOCK`."""
    return -(-length // BLOCK) * BLOCK


def admit(waiting: Sequence[Waiting], running: Running, room: Room) -> int:
    """Return how many requests from the head of the queue begin now.

    An isolated request begins when nothing runs, and nothing else begins until it has ended.
    """
    if running.isolated:
        return 0
    rows, length, tokens = running.rows, running.length, 0
    for count, item in enumerate(waiting):
        if item.isolated:
            return count or int(running.rows == 0)
        rows, tokens = rows + item.rows, tokens + item.prompt
        length = max(length, item.length if item.rows else 0)
        if rows > room.rows or rows * length > room.positions or (count and tokens > room.prompt_tokens):
            return count
    return len(waiting)


def prefill_groups(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split prompts, given by their lengths, into passes; return the indices of each pass.

    Prompts of a pass are padded to its longest. A pass holds `budget` tokens at most, padding included (or one prompt),
    and no more than a quarter of it is padding unless that is little.
    """
    groups: list[list[int]] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        longest = lengths[groups[-1][0]] if groups else 0
        area = (len(groups[-1]) + 1) * longest if groups else 0
        padding = area - total - lengths[index]
        if not groups or area > budget or padding > max(area // 4, _TOLERATED_PADDING):
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += lengths[index]
    return groups


def grown(have: Shape, need: Shape, promised: int, room: Room) -> Shape:
    """Return the cache's next shape: it fits `need`, and doubles so that it seldom has to grow again.

    `need.length` and `promised`, the positions that the longest row may ever need, are multiples of `BLOCK`. Where the
    double is more than `room`, the shape is exactly what is needed.
    """
    if need.rows <= have.rows and need.length <= have.length:
        return have
    rows, length = have.rows, have.length
    if need.rows > rows:
        rows = min(max(need.rows, 2 * rows, FIRST_ROWS), room.rows)
    if need.length > length:
        length = max(need.length, min(max(2 * length, FIRST_LENGTH), promised))
    return Shape(rows, length) if rows * length <= room.positions else need


def compaction(ended: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Return which rows move where, so that those that have not ended become the first ones with the fewest moves."""
    left = len(ended) - sum(ended)
    holes = [row for row in range(left) if ended[row]]
    movers = [row for row in range(left, len(ended)) if not ended[row]]
    return movers, holes
