"""Fills one GPU as well as possible: depth-first over kinds, bounded by a number of tries.

Filling bin after bin to the best, rather than placing item after item, is the minimum bin slack idea (Gupta and Ho
1999, "A new heuristic algorithm for the one-dimensional bin-packing problem", Production Planning & Control 10(6)),
here over kinds with counts and in two dimensions, of which a weighted sum says how full the GPU is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A kind that may go in."""

    kind: int
    memory: int
    milli: int
    most: int
    """How many are left of it."""
    value: float


class _Search:
    """The depth-first search; `best` is the fullest content found so far."""

    def __init__(self, candidates: Sequence[Candidate], per_memory: float, per_milli: float, tries: int) -> None:
        self.candidates = candidates
        self.per_memory, self.per_milli = per_memory, per_milli
        self.tries = tries
        self.best: list[tuple[int, int]] = []
        self.best_value = -1.0
        self._chosen: list[tuple[int, int]] = []
        least_memory = least_milli = 1 << 60
        self._least: list[tuple[int, int]] = []
        for candidate in reversed(candidates):
            least_memory, least_milli = min(least_memory, candidate.memory), min(least_milli, candidate.milli)
            self._least.append((least_memory, least_milli))
        self._least.reverse()

    def run(self, place: int, memory: int, milli: int, value: float) -> None:
        """Try what goes in from the candidate `place` on, the most of it first."""
        if value > self.best_value:
            self.best_value, self.best = value, self._chosen.copy()
        candidates = self.candidates
        while place < len(candidates) and self.tries > 0:
            if value + memory * self.per_memory + milli * self.per_milli <= self.best_value + 1e-9:
                return
            if self._least[place][0] > memory or self._least[place][1] > milli:
                return
            candidate = candidates[place]
            place += 1
            if candidate.memory > memory or candidate.milli > milli:
                continue
            most = min(candidate.most, memory // candidate.memory, milli // candidate.milli)
            for times in range(most, 0, -1):
                self.tries -= 1
                self._chosen.append((candidate.kind, times))
                self.run(
                    place,
                    memory - times * candidate.memory,
                    milli - times * candidate.milli,
                    value + times * candidate.value,
                )
                self._chosen.pop()
                if self.tries <= 0:
                    return


def fill(
    memory: int, milli: int, candidates: Sequence[Candidate], weights: tuple[float, float], tries: int
) -> tuple[list[tuple[int, int]], float]:
    """The content that fills a GPU best, as (kind, times), and its value.

    `weights` are the worth of a MiB and of a milli-GPU; candidates come most valuable first, and cost at least one of
    each.
    """
    search = _Search(candidates, *weights, tries)
    search.run(0, memory, milli, 0.0)
    return search.best, search.best_value
