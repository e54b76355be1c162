"""Runs the batches of many runs through the model: packed, in parts that fit, gradients kept apart.

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

from services.trainer.engines.run_state import RunState
from services.trainer.engines.work import Chunk, Work
from shared.errors import PermanentError
from shared.models.attention import hidden_states
from shared.models.logprobs import target_logprobs, unembedding
from shared.models.lora import AdapterBank
from shared.models.packing import Packed, Tree, fill_passes, grow_trees, pack


@dataclass(frozen=True)
class PassSettings:
    """How work is cut."""

    max_rows: int
    """Most tokens in one part, after sharing; a longer sequence gets a part of its own."""
    head_rows: int
    """Most rows whose logits are held at a time."""
    pairs_per_token: int | None
    """Given to `grow_trees`: when prefixes are shared. None: never."""


class PassRunner:
    """Computes `Work` on one model."""

    def __init__(self, model: PreTrainedModel, bank: AdapterBank, settings: PassSettings) -> None:
        self._model, self._bank, self._settings = model, bank, settings
        self._unembed = unembedding(model)

    def run(self, work: Work, states: Mapping[str, RunState]) -> None:
        """Fill the log-probabilities, gradients and failures of `work`. No state changes."""
        for backward in (True, False):
            trees = [tree for tree, moves in self._trees(work) if moves == backward]
            for part in fill_passes(trees, self._settings.max_rows):
                self._split_until_it_fits(work, states, part, backward=backward)

    def _trees(self, work: Work) -> Iterator[tuple[Tree, bool]]:
        """Yield the trees of every run and whether they need a backward pass."""
        for run, indices in work.sequences_by_run():
            for backward in (True, False):
                chosen = {i: work.sequences[i] for i in indices if bool(work.moves[work.span(i)].any()) == backward}
                settings = self._settings
                for tree in grow_trees(
                    run, chosen, max_rows=settings.max_rows, pairs_per_token=settings.pairs_per_token
                ):
                    yield tree, backward

    def _split_until_it_fits(
        self, work: Work, states: Mapping[str, RunState], part: list[Tree], *, backward: bool
    ) -> None:
        """Compute a part; where the device's memory is too small, its halves, down to single sequences."""
        waiting = [part]
        while waiting:
            trees = waiting.pop()
            if self._fits(work, states, trees, backward=backward):
                continue
            torch.cuda.empty_cache()
            halves = _halves(trees)
            if halves is None:
                text = f"a sequence of {trees[0].rows} tokens does not fit into the trainer's memory"
                work.failures[str(trees[0].run)] = PermanentError(text)
            else:
                waiting += reversed(halves)

    def _fits(self, work: Work, states: Mapping[str, RunState], trees: list[Tree], *, backward: bool) -> bool:
        present = {str(tree.run): states[str(tree.run)] for tree in trees}
        try:
            with torch.set_grad_enabled(backward):
                self._compute(work, trees, backward=backward)
        except torch.OutOfMemoryError:
            for state in present.values():
                state.forget_gradient()
            return False
        if backward:
            for run, state in present.items():
                gradient = state.take_gradient()
                work.gradients[run] = work.gradients[run].add_(gradient) if run in work.gradients else gradient
        return True

    def _compute(self, work: Work, trees: list[Tree], *, backward: bool) -> None:
        packed = pack(trees, work.sequences, work.targets.device)
        with self._bank.use(packed.segments):
            hidden = hidden_states(self._model, packed)
        with torch.no_grad():
            for chunk in work.chunks(packed, self._settings.head_rows, moving=False):
                self._predict(work, chunk, hidden)
            self._compare_sequences(work, packed, hidden)
        if backward:
            self._backward(work, packed, hidden)

    def _compare_sequences(self, work: Work, packed: Packed, hidden: Tensor) -> None:
        """Give the losses that need whole sequences what they need, before the first chunk of one goes backward.

        Only they pay for it: the unembedding of their rows is computed once more.
        """
        if bool(work.compared.any()):
            for chunk in work.chunks(packed, self._settings.head_rows, moving=True, among=work.compared):
                self._predict(work, chunk, hidden)
            work.fill_sequence_ratios(packed.rows)

    def _predict(self, work: Work, chunk: Chunk, hidden: Tensor) -> Tensor:
        """Write the chunk's log-probabilities down; return them too, [pairs], still differentiable."""
        device = hidden.device
        with self._bank.use(chunk.row_segments):
            logits = self._unembed(hidden[chunk.rows.to(device)])
        places = chunk.places.to(device)
        logprobs = target_logprobs(logits, chunk.local.to(device), work.targets[places])
        work.logprobs[places] = logprobs.detach()
        return logprobs

    def _backward(self, work: Work, packed: Packed, hidden: Tensor) -> None:
        """Go back chunk by chunk to the hidden states, then once through the layers."""
        ends = hidden.detach().requires_grad_(hidden.requires_grad)
        for chunk in work.chunks(packed, self._settings.head_rows, moving=True):
            logprobs = self._predict(work, chunk, ends)
            given = work.given[chunk.places.to(hidden.device)]
            losses = [
                work.batches[run].loss.per_token(logprobs[pairs], given[pairs]).sum()
                for run, pairs in chunk.pair_segments
            ]
            torch.autograd.backward(torch.stack(losses).sum())
        if hidden.requires_grad:
            torch.autograd.backward(hidden, ends.grad)


def _halves(trees: list[Tree]) -> list[list[Tree]] | None:
    """Split a part in two, a single tree too; None for a single sequence."""
    if len(trees) > 1:
        middle = len(trees) // 2
        return [trees[:middle], trees[middle:]]
    if len(trees[0].branches) > 1:
        return [[half] for half in trees[0].halves()]
    return None
