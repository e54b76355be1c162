"""Runs the batches of many runs through the model: packed, in parts that fit, gradients kept apart.

A part of several runs in which numbers are not finite is computed again, split between runs, where these may have met.

Every part is a forward pass, the unembedding chunk by chunk, and a backward pass. Sequences that cannot move any
weight, because their weights or advantages are all zero or because only the loss was asked for, go through parts of
their own without a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.trainer.engines.body import Body
from services.trainer.engines.run_state import RunState
from services.trainer.engines.work import Chunk, Work
from shared.errors import PermanentError
from shared.models.logprobs import target_logprobs, unembedding
from shared.models.lora import AdapterBank
from shared.models.packing import Tree, fill_passes, grow_trees, pack


@dataclass(frozen=True)
class PassSettings:
    """How work is cut."""

    max_rows: int
    """Most tokens in one part, after sharing; a longer sequence gets a part of its own."""
    head_rows: int
    """Most rows whose logits are held at a time."""


class PassRunner:
    """Computes `Work` on one model."""

    def __init__(self, body: Body, model: PreTrainedModel, bank: AdapterBank, settings: PassSettings) -> None:
        """`body` computes the layers of `model`, `bank` has the adapters of its unembedding."""
        self._body, self._bank, self._settings = body, bank, settings
        self._unembed = unembedding(model)
        self._max_rows = settings.max_rows

    def try_large_passes(self) -> None:
        """Take up large passes again, after memory has become free."""
        self._max_rows = self._settings.max_rows

    def run(self, work: Work, states: Mapping[str, RunState]) -> None:
        """Fill the log-probabilities, gradients and failures of `work`. No state changes."""
        for backward in (True, False):
            trees = [tree for tree, moves in self._trees(work) if moves == backward]
            for part in fill_passes(trees, self._max_rows):
                self._split_until_it_fits(work, states, part, backward=backward)

    def _trees(self, work: Work) -> Iterator[tuple[Tree, bool]]:
        """Yield the trees of every run and whether they need a backward pass."""
        for run, indices in work.sequences_by_run():
            for backward in (True, False):
                chosen = {i: work.sequences[i] for i in indices if bool(work.moves[work.span(i)].any()) == backward}
                most, shared = self._max_rows, self._body.pairs_per_token
                for tree in grow_trees(run, chosen, max_rows=most, pairs_per_token=shared):
                    yield tree, backward

    def _split_until_it_fits(
        self, work: Work, states: Mapping[str, RunState], part: list[Tree], *, backward: bool
    ) -> None:
        """Compute a part; where the device's memory is too small, its halves, down to single sequences.

        Parts as large are not tried again: finding out that they do not fit costs more than a pass.
        """
        waiting = [part]
        while waiting:
            waiting += reversed(self._left_of(work, states, waiting.pop(), backward=backward))

    def _left_of(
        self, work: Work, states: Mapping[str, RunState], trees: list[Tree], *, backward: bool
    ) -> list[list[Tree]]:
        """Compute a part; return nothing, or the smaller parts that are to be computed in its place."""
        present = {str(tree.run): states[str(tree.run)] for tree in trees}
        try:
            self._compute(work, trees, present, backward=backward)
            gradients = self._body.gradients(present) if backward else {}
        except torch.OutOfMemoryError:
            self._body.forget(present)
            return self._smaller(work, trees)
        if self._body.spoiled():
            return _by_runs(trees)
        for run, gradient in gradients.items():
            work.gradients[run] = work.gradients[run].add_(gradient) if run in work.gradients else gradient
        return []

    def _smaller(self, work: Work, trees: list[Tree]) -> list[list[Tree]]:
        """Return the halves of a part that did not fit, or note that a single sequence does not."""
        torch.cuda.empty_cache()
        halves = _halves(trees)
        if halves is None:
            text = f"a sequence of {trees[0].rows} tokens does not fit into the trainer's memory"
            work.failures[str(trees[0].run)] = PermanentError(text)
            return []
        self._max_rows = min(self._max_rows, max(1, sum(tree.rows for tree in trees) // 2))
        return halves

    def _compute(self, work: Work, trees: list[Tree], states: Mapping[str, RunState], *, backward: bool) -> None:
        packed = pack(trees, work.sequences, work.targets.device, masks=self._body.masks)
        # Cut before anything is launched: sending the cuts to a GPU waits for what runs there.
        most = self._settings.head_rows
        still, moving = (list(work.chunks(packed, most, moving=flag)) for flag in (False, True))
        # Losses over whole sequences need all of their logprobs before the first chunk of one goes backward.
        compared = list(work.chunks(packed, most, moving=True, among=work.compared)) if work.compared.any() else []
        hidden = self._body.forward(packed, trees, states, backward=backward)
        with torch.no_grad():
            for chunk in (*still, *compared):
                self._predict(work, chunk, hidden.index_select(0, chunk.rows))
            if compared:
                work.fill_sequence_ratios(packed.rows)
        if backward:
            self._backward(work, moving, hidden)

    def _predict(self, work: Work, chunk: Chunk, hidden: Tensor) -> Tensor:
        """Write the log-probabilities of a chunk down, whose rows are given; return them, [pairs], differentiable."""
        with self._bank.use(chunk.row_segments):
            logits = self._unembed(hidden)
        logprobs = target_logprobs(logits, chunk.local, work.targets[chunk.places])
        work.logprobs[chunk.places] = logprobs.detach()
        return logprobs

    def _backward(self, work: Work, chunks: list[Chunk], hidden: Tensor) -> None:
        """Go back chunk by chunk to the hidden states, then once through the layers."""
        gradient = torch.zeros_like(hidden)
        for chunk in chunks:
            rows = hidden.index_select(0, chunk.rows).requires_grad_()
            logprobs = self._predict(work, chunk, rows)
            given = work.given[chunk.places]
            losses = [
                work.batches[run].loss.per_token(logprobs[pairs], given[pairs]).sum()
                for run, pairs in chunk.pair_segments
            ]
            torch.autograd.backward(torch.stack(losses).sum())
            gradient.index_copy_(0, chunk.rows, rows.grad)  # type: ignore[arg-type]
        self._body.backward(gradient)


def _by_runs(trees: list[Tree]) -> list[list[Tree]]:
    """Split a part of several runs between two of them."""
    runs = list(dict.fromkeys(tree.run for tree in trees))
    first = set(runs[: len(runs) // 2])
    return [[tree for tree in trees if (tree.run in first) == chosen] for chosen in (True, False)]


def _halves(trees: list[Tree]) -> list[list[Tree]] | None:
    """Split a part in two, a single tree too; None for a single sequence."""
    if len(trees) > 1:
        middle = len(trees) // 2
        return [trees[:middle], trees[middle:]]
    if len(trees[0].branches) > 1:
        return [[half] for half in trees[0].halves()]
    return None
