"""What computes hidden states for a part of a pass, and takes their gradient back to the runs.

`AdaptedModel` runs the model's own modules and serves every supported family on every device;
`fused.layers.FusedLayers` runs functions of its own, for speed on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.trainer.engines.run_state import RunState
from shared.models.attention import hidden_states
from shared.models.lora import AdapterBank
from shared.models.packing import Packed, Tree


class Body(Protocol):
    """Everything of a model between its tokens and its unembedding."""

    pairs_per_token: int | None
    """Given to `grow_trees`: when prefixes are shared."""
    masks: bool
    """Given to `pack`: whether attention goes by masks."""

    def forward(
        self, packed: Packed, trees: Sequence[Tree], states: Mapping[str, RunState], *, backward: bool
    ) -> Tensor:
        """Return the hidden states after the last norm, [rows, hidden], without history.

        `packed` are the trees laid out, those of a run neighbours. With `backward` the next call may be `backward`.
        """

    def backward(self, gradient: Tensor) -> None:
        """Go back from the gradient of the hidden states of the last `forward`."""

    def gradients(self, states: Mapping[str, RunState]) -> dict[str, Tensor]:
        """Return what the last pass left for each run, a vector like its weights, and forget it."""

    def spoiled(self) -> bool:
        """Whether the last pass counts for nothing: numbers of one run, not finite, may have come into the others'.

        Asked after `gradients`, or after `forward` where no gradient was wanted.
        """

    def forget(self, states: Mapping[str, RunState]) -> None:
        """Drop what a pass that broke off has left."""


class AdaptedModel:
    """The model's own modules, with an `AdapterBank` in them."""

    masks = True

    def __init__(self, model: PreTrainedModel, bank: AdapterBank, pairs_per_token: int | None) -> None:
        self._model, self._bank = model, bank
        self._hidden: Tensor | None = None
        self.pairs_per_token = pairs_per_token

    def forward(
        self, packed: Packed, trees: Sequence[Tree], states: Mapping[str, RunState], *, backward: bool
    ) -> Tensor:
        """See `Body.forward`; gradients end in `grad` of each run's tensors."""
        with self._bank.use(packed.segments), torch.set_grad_enabled(backward):
            hidden = hidden_states(self._model, packed)
        self._hidden = hidden if hidden.requires_grad else None
        return hidden.detach()

    def backward(self, gradient: Tensor) -> None:
        """See `Body.backward`."""
        hidden, self._hidden = self._hidden, None
        if hidden is not None:
            torch.autograd.backward(hidden, gradient)

    def gradients(self, states: Mapping[str, RunState]) -> dict[str, Tensor]:
        """See `Body.gradients`."""
        return {run: state.take_gradient() for run, state in states.items()}

    def spoiled(self) -> bool:
        """See `Body.spoiled`: rows of one run never meet those of another."""
        return False

    def forget(self, states: Mapping[str, RunState]) -> None:
        """See `Body.forget`."""
        self._hidden = None
        for state in states.values():
            state.forget_gradient()
