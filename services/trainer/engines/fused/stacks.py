"""The adapters of the runs of a pass, stacked so that one product serves them all.

For each kind of projection there is A [layers, runs, parts * rank, in] and B, in the model's dtype. Ranks are filled up
with zeros to a common one, and B is zero where a part's outputs meet another part's rank, so a joined projection with
its adapters is again one product. B holds the factor alpha / rank.

*Dense* stacks, for few ranks, have B as [layers, out, runs * parts * rank] and copy it behind the frozen weights, where
`layer.project` reads it. The others have it as [layers, runs, out, parts * rank] for grouped products, whose cost does
not grow with the runs.

A run's own fp32 vector keeps all layers of one matrix together (`Adapter.places`), so that moving a run in or out takes
a few strided copies, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import msgspec
import torch
from torch import Tensor

from services.trainer.engines.fused.layer import Stack
from services.trainer.engines.fused.projections import KindShape
from services.trainer.engines.run_state import RunState
from shared.models.lora import Adapter

LARGEST_COPY = 2**28
"""Numbers that are gathered at a time."""
RANKS = (8, 16, 32, 64, 128)
"""Ranks of stacks: multiples of 8, as grouped products need."""


def stack_rank(ranks: Sequence[int]) -> int:
    """Return the rank of a stack that holds these."""
    return next(rank for rank in RANKS if rank >= max(ranks))


class Stacks:
    """Stacks for up to `places` runs."""

    def __init__(
        self, shapes: Sequence[KindShape], wide: Sequence[Sequence[Tensor]], places: int, rank: int, *, dense: bool
    ) -> None:
        """`wide` has the frozen weights with their room, layer by layer, kind by kind."""
        self.places, self.rank, self.dense = places, rank, dense
        self._shapes, self._layers, self._wide = shapes, len(wide), wide
        like, columns = wide[0][0], [len(s.outputs) * rank for s in shapes]
        self._a = [like.new_zeros(len(wide), places, c, s.inputs) for s, c in zip(shapes, columns, strict=True)]
        outputs = [sum(s.outputs) for s in shapes]
        sizes = [(o, places * c) if dense else (places, o, c) for o, c in zip(outputs, columns, strict=True)]
        self._b = [like.new_zeros(len(wide), *size) for size in sizes]
        self.leaves: list[tuple[Stack, ...]] = [
            tuple((a[layer].requires_grad_(), b[layer].requires_grad_()) for a, b in zip(self._a, self._b, strict=True))
            for layer in range(len(wide))
        ]
        """For each layer the stack of each kind, as the leaves of a pass."""

    @property
    def tensors(self) -> list[Tensor]:
        """Every leaf: layer by layer, kind by kind, A and B."""
        return [tensor for layer in self.leaves for stack in layer for tensor in stack]

    @torch.no_grad()
    def fill(self, states: Sequence[RunState]) -> None:
        """Put the runs' weights in, in this order; places that stay free hold zeros."""
        for tensor in (*self._a, *self._b):
            tensor.zero_()
        for first, alike in self._alike(states):
            vectors = torch.stack([state.weights for state in alike])
            for ours, theirs, scale in self._blocks(self._a, self._b, first, alike[0].adapter, vectors):
                torch.mul(theirs, scale, out=ours)
        if self.dense:
            for weights, stacks in zip(self._wide, self.leaves, strict=True):
                for wide, (a, b) in zip(weights, stacks, strict=True):
                    wide[:, a.shape[2] : a.shape[2] + b.shape[1]].copy_(b)

    @torch.no_grad()
    def gradients(self, leaves: Sequence[Tensor], states: Sequence[RunState]) -> list[Tensor]:
        """Return each run's gradient as a vector like its weights, from the gradients of `tensors`."""
        count = 2 * len(self._shapes)
        a, b = (
            [torch.stack([leaves[layer * count + 2 * kind + which] for layer in range(self._layers)])
             for kind in range(len(self._shapes))]
            for which in (0, 1)
        )  # fmt: skip
        found: list[Tensor] = []
        for first, alike in self._alike(states):
            size = alike[0].weights.numel()
            joined = torch.zeros(len(alike), size, device=a[0].device)
            for theirs, ours, scale in self._blocks(a, b, first, alike[0].adapter, joined):
                torch.mul(theirs, scale, out=ours)
            found += joined.unbind()
        return found

    def _alike(self, states: Sequence[RunState]) -> Iterator[tuple[int, list[RunState]]]:
        """Yield neighbours whose vectors have one layout, with the place of the first; not too many at a time."""
        first = 0
        for _, group in groupby(states, lambda state: msgspec.structs.replace(state.adapter.spec, seed=None)):
            alike = list(group)
            most = max(1, LARGEST_COPY // alike[0].weights.numel())
            for start in range(0, len(alike), most):
                yield first + start, alike[start : start + most]
            first += len(alike)

    def _blocks(
        self, a: Sequence[Tensor], b: Sequence[Tensor], first: int, adapter: Adapter, vectors: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield pairs of views, [layers, runs, ...], of the stacks from place `first` on and of the runs' vectors.

        With each pair comes the factor of the stack's.
        """
        rank, runs = adapter.spec.rank, len(vectors)
        spans = _spans(adapter)
        by_run = [torch.unflatten(stack, 2, (self.places, -1)).transpose(1, 2) if self.dense else stack for stack in b]
        for shape, stack_a, stack_b in zip(self._shapes, a, by_run, strict=True):
            places_a, places_b = stack_a[:, first : first + runs], stack_b[:, first : first + runs]
            for part, (name, begin, size) in enumerate(zip(shape.kind.parts, shape.starts, shape.outputs, strict=True)):
                if name not in spans:
                    continue
                span_a, span_b = (vectors[:, span] for span in spans[name])
                column = part * self.rank
                vectors_a = span_a.view(runs, self._layers, rank, shape.inputs).transpose(0, 1)
                yield places_a[:, :, column : column + rank], vectors_a, 1.0
                vectors_b = span_b.view(runs, self._layers, size, rank).transpose(0, 1)
                yield places_b[:, :, begin : begin + size, column : column + rank], vectors_b, adapter.scale


def _spans(adapter: Adapter) -> dict[str, tuple[slice, slice]]:
    """Return for each matrix, by its last name, where A and B of all layers lie in the run's vector."""
    ends: dict[tuple[str, int], int] = {}
    place = 0
    for path, which in adapter.places:
        place += adapter.weights[path][which].numel()
        ends[path.rpartition(".")[2], which] = place
    starts = [0, *ends.values()]
    spans = {key: slice(*edges) for key, edges in zip(ends, pairwise(starts), strict=True)}
    return {name: (spans[name, 0], spans[name, 1]) for name, which in ends if which == 0}
