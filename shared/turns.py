"""Whose messages a replica takes next, where each owner has a line of its own. Pure.

The line of which the replica holds fewest is next; of equal ones, the one that has waited longest for a turn. It is
given so many places that it catches up with an equal share of what all that wait could have, and no more: so a line
that comes later does not find the free places taken by those that were asked a moment before.
"""

from __future__ import annotations

from collections.abc import Mapping


def next_line(waiting: Mapping[str, int], held: Mapping[str, int], free: int) -> tuple[str, int]:
    """Choose a line and how many messages to take from it.

    `waiting` has, for each line that may have messages, the number of its last turn; `held`, how many messages of a
    line are in work here. `free` is at least 1, and so is the number.
    """
    line = min(waiting, key=lambda name: (held.get(name, 0), waiting[name]))
    places = free + sum(held.get(name, 0) for name in waiting)
    share = -(-places // len(waiting))
    return line, min(free, max(1, share - held.get(line, 0)))
