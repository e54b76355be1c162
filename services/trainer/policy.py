"""What a trainer does next. Pure: plain data in, plain data out, no clock.

A run's log is executed strictly in `seq` order. Over runs, cheap operations that somebody waits for go first, then all
optimizer steps whose turn has come, then one pass over sequences of many runs, up to a token budget. Which sequences
those are, `services.trainer.fair` decides: tenants share the passes by weight. A forward and backward operation that
is larger than what is left is cut between its data and goes on in later passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from services.trainer.fair import FairPasses, Piece
from shared.contracts.training import AnyOperation, ForwardBackward, OptimStep

CHEAP_IN_A_ROW = 8
"""Cheap operations of one run between two passes that wait: more than any loop needs, and nobody can keep passes up."""


@dataclass(frozen=True)
class Head:
    """A run's next operation."""

    operation: AnyOperation
    tenant: str
    """Owner of the run."""
    done: int = 0
    """How many data of the operation earlier passes have had."""


@dataclass(frozen=True)
class Turn:
    """The next thing to do: exactly one of the three is set."""

    single: str = ""
    """Run whose head is executed by itself."""
    steps: tuple[str, ...] = ()
    """Runs whose optimizer steps are applied together."""
    pieces: tuple[Piece, ...] = ()
    """Data of many runs' heads that go through one pass. A run is in it once."""


def sizes_of(operation: ForwardBackward) -> list[int]:
    """Tokens of each datum. What is empty counts 1, so that it has its turn, in which it is refused."""
    return [max(1, len(datum.tokens)) for datum in operation.data] or [1]


def tokens_of(operation: AnyOperation, done: int = 0) -> int:
    """Tokens that an operation still takes through passes."""
    return sum(sizes_of(operation)[done:]) if isinstance(operation, ForwardBackward) else 0


class Scheduler:
    """Chooses turn after turn, and remembers what is fair next."""

    def __init__(self, budget: int, weights: Mapping[str, float]) -> None:
        """`budget` is the tokens of a pass; `weights` of tenants are 1 where none is given."""
        self._fair = FairPasses(budget, weights)
        self._cheap: Counter[str] = Counter()
        self._singles: dict[str, int] = {}
        self._turn = 0

    def next_turn(self, heads: Mapping[str, Head]) -> Turn | None:
        """Choose among the runs' heads. None: nothing to do. What is chosen counts as done."""
        self._turn += 1
        passes = {run: head for run, head in heads.items() if isinstance(head.operation, ForwardBackward)}
        cheap = [run for run in heads if run not in passes and not (passes and self._cheap[run] >= CHEAP_IN_A_ROW)]
        steps = tuple(run for run in cheap if isinstance(heads[run].operation, OptimStep))
        others = [run for run in cheap if run not in steps]
        if others:
            return self._single(min(others, key=lambda run: self._singles.get(run, 0)))
        if steps:
            self._cheap.update(steps)
            return Turn(steps=steps)
        return self._pass(passes) if passes else None

    def forget(self, run: str) -> None:
        """The run has gone."""
        self._singles.pop(run, None)
        self._fair.forget(run)

    def _single(self, run: str) -> Turn:
        self._singles[run] = self._turn
        self._cheap[run] += 1
        return Turn(single=run)

    def _pass(self, heads: Mapping[str, Head]) -> Turn:
        self._cheap.clear()
        tenants = {run: head.tenant for run, head in heads.items()}
        sizes = {run: sizes_of(head.operation) for run, head in heads.items()}  # type: ignore[arg-type]
        return Turn(pieces=self._fair.next_pass(tenants, sizes, {run: head.done for run, head in heads.items()}))
