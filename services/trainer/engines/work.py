"""The batches of one call joined, and which rows of a packed part predict which of their tokens.

Every target of every batch has a *place* in tensors of length M, in the order of the batches. A *row* is a token of a
packed part, after sharing: one row may predict at the places of several sequences, and at several places of one where
a token has several targets.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from services.trainer.engines.batch import Batch
from shared.errors import PermanentError
from shared.models.lora import Segment
from shared.models.losses import Given, sequence_log_ratio
from shared.models.packing import Packed


@dataclass(frozen=True)
class Chunk:
    """Rows whose logits are computed together. Rows, and the pairs of a run, are neighbours."""

    rows: Tensor
    """Rows of the part, int64 [rows], ascending."""
    local: Tensor
    """For each pair, which of `rows` predicts, int64 [pairs]."""
    places: Tensor
    """For each pair, the place of what is predicted, int64 [pairs]."""
    row_segments: list[Segment]
    """Run, first and last `rows`, for `AdapterBank.use`."""
    pair_segments: list[tuple[str, slice]]
    """Run and its pairs."""

    def to(self, device: torch.device) -> Chunk:
        """Return it with its tensors on another device."""
        rows, local, places = (tensor.to(device) for tensor in (self.rows, self.local, self.places))
        return Chunk(rows, local, places, self.row_segments, self.pair_segments)


class Work:
    """What one call computes, and where its results gather."""

    def __init__(self, batches: Sequence[Batch], device: torch.device) -> None:
        self.batches = {batch.run: batch for batch in batches}
        self.sequences: dict[int, array[int]] = dict(enumerate(s for batch in batches for s in batch.sequences))
        self.widths = [width for batch in batches for width in batch.widths]
        self.starts = [0, *accumulate(length for batch in batches for length in batch.lengths)]
        self.targets = torch.cat([batch.targets for batch in batches]).to(device)
        self.given = Given.join([batch.given for batch in batches]).to(device)
        self.moves = torch.cat([batch.loss.moves(batch.given) & batch.backward for batch in batches])
        """Which places have a gradient, bool [M], on the CPU."""
        self.compared = torch.cat([torch.full([batch.size], batch.loss.needs_sequences) for batch in batches])
        """Which places are of losses that need whole sequences, bool [M], on the CPU."""
        self.logprobs = torch.zeros(self.starts[-1], device=device)
        """Of each target, fp32 [M]: filled part by part."""
        self.gradients: dict[str, Tensor] = {}
        """Of each run that has one, as `RunState.take_gradient` gives it."""
        self.failures: dict[str, PermanentError] = {}
        """Runs that cannot be computed."""

    def to_host(self) -> None:
        """Bring the results to the CPU, in one go: from there on they are looked at run by run."""
        host = torch.device("cpu")
        self.logprobs, self.given = self.logprobs.to(host), self.given.to(host)

    def span(self, sequence: int) -> slice:
        """Return the places of a sequence."""
        return slice(self.starts[sequence], self.starts[sequence + 1])

    def sequences_by_run(self) -> Iterator[tuple[str, range]]:
        """Yield each run with the indices of its sequences."""
        first = 0
        for run, batch in self.batches.items():
            yield run, range(first, first + len(batch.sequences))
            first += len(batch.sequences)

    def places_by_run(self) -> Iterator[tuple[Batch, slice]]:
        """Yield each batch with its places."""
        for run, indices in self.sequences_by_run():
            yield self.batches[run], slice(self.starts[indices.start], self.starts[indices.stop])

    def fill_sequence_ratios(self, sequences: Collection[int]) -> None:
        """Work out the ratios of sequences from their log-probabilities, where their losses need them."""
        for span in map(self.span, sequences):
            if self.compared[span.start]:
                given = self.given[span]
                ratio = sequence_log_ratio(self.logprobs[span], given.logprobs, given.ratio_mask)
                self.given.sequence_log_ratio[span] = ratio

    def chunks(self, packed: Packed, most: int, *, moving: bool, among: Tensor | None = None) -> Iterator[Chunk]:
        """Cut the rows of a part that have a gradient, or those that have none, in chunks of at most `most` rows.

        `among` narrows down which places are predicted, bool [M], on the CPU.
        """
        rows = torch.cat([self._rows(packed, index) for index in packed.rows])
        places = torch.cat([torch.arange(*self.span(index).indices(self.starts[-1])) for index in packed.rows])
        live = torch.zeros(packed.tokens.shape[0], dtype=torch.bool)
        live[rows[self.moves[places]]] = True
        chosen = live[rows] == moving
        if among is not None:
            chosen &= among[places]
        unique, local = torch.unique(rows[chosen], return_inverse=True)
        places = places[chosen]
        for first in range(0, len(unique), most):
            inside = (local >= first) & (local < first + most)
            chunk = _chunk(packed, unique[first : first + most], local[inside] - first, places[inside])
            yield chunk.to(self.targets.device)

    def _rows(self, packed: Packed, sequence: int) -> Tensor:
        """Return for each place of a sequence the row that predicts there."""
        rows, width = packed.rows[sequence], self.widths[sequence]
        return rows if width == 1 else rows.repeat_interleave(width)


def _chunk(packed: Packed, rows: Tensor, local: Tensor, places: Tensor) -> Chunk:
    """Find the runs in a chunk. Pairs stand in the order of the trees, so those of a run are neighbours too."""
    row_segments: list[Segment] = []
    pair_segments: list[tuple[str, slice]] = []
    for run, start, stop in packed.segments:
        first, last = (int(edge) for edge in torch.searchsorted(rows, torch.tensor([start, stop])))
        if last > first:
            row_segments.append((run, first, last))
            pair_segments.append((str(run), slice(int((local < first).sum()), int((local < last).sum()))))
    return Chunk(rows, local, places, row_segments, pair_segments)
