"""Compares the fused layers with the model's own modules, once, before anything is trained.

Kernels of attention and grouped products differ between devices and releases. One that means something else, by how it
aligns queries with keys for instance, would train wrong weights without any error, so it is found out here.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.trainer.engines.body import AdaptedModel, Body
from services.trainer.engines.fused.layers import FusedLayers
from services.trainer.engines.run_state import RunState
from shared.contracts.policies import LoraSpec
from shared.models.lora import Adapter, AdapterBank
from shared.models.packing import Tree, grow_trees, pack

RUNS = {"self-check/one": LoraSpec(rank=8, seed=1), "self-check/other": LoraSpec(rank=16, seed=2)}
SHARED = 21
LENGTHS = {"self-check/one": (34, 29), "self-check/other": (17,)}
_TOLERANCE = {torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.2  # bfloat16 and float16 through many layers; what is misaligned differs by its own size


def error(model: PreTrainedModel, bank: AdapterBank, fused: FusedLayers) -> float:
    """Return how far hidden states and gradients are apart, relative to their size: the worst of them."""
    states = {name: _state(model, spec) for name, spec in RUNS.items()}
    for name, state in states.items():
        bank.add(name, state.adapter)
    try:
        expected = _computed(AdaptedModel(model, bank, None), states, model)
        with torch.compiler.set_stance("force_eager"), fused.uncaptured():
            found = _computed(fused, states, model)
    finally:
        for name in RUNS:
            bank.remove(name)
    return max(_distance(found[name], expected[name]) for name in expected)


def tolerance(model: PreTrainedModel) -> float:
    """Return the error that is rounding."""
    return _TOLERANCE.get(model.dtype, _COARSE_TOLERANCE)


def _state(model: PreTrainedModel, spec: LoraSpec) -> RunState:
    """Return a run whose B is not zero, and small beside the weights."""
    state = RunState(Adapter.fresh(model, spec))
    state.weights.add_(torch.sin(torch.arange(len(state.weights), device=state.weights.device)), alpha=1e-3)
    return state


def _computed(body: Body, states: Mapping[str, RunState], model: PreTrainedModel) -> dict[str, Tensor]:
    sequences = _sequences(model)
    trees: list[Tree] = []
    for number, name in enumerate(LENGTHS):
        own = {index: tokens for index, tokens in sequences.items() if index // 2 == number}
        trees += grow_trees(name, own, max_rows=4096, pairs_per_token=body.pairs_per_token)
    packed = pack(trees, sequences, model.device, masks=body.masks)
    hidden = body.forward(packed, trees, states, backward=True)
    gradient = torch.zeros_like(hidden)
    for path in packed.rows.values():
        rows = path.to(hidden.device)
        wish = torch.cos(torch.arange(len(rows) * hidden.shape[1], device=hidden.device)).view(len(rows), -1)
        gradient.index_add_(0, rows, wish.to(gradient.dtype))
    body.backward(gradient)
    found = {str(index): hidden[path.to(hidden.device)] for index, path in packed.rows.items()}
    return found | body.gradients(states)


def _sequences(model: PreTrainedModel) -> dict[int, array[int]]:
    """Return two sequences of the first run, which begin alike, and one of the other."""
    size = model.get_input_embeddings().num_embeddings
    ids = [number * 7919 % size for number in range(1, 200)]
    (long, short), (other,) = LENGTHS.values()
    return {
        0: array("i", ids[:long]),
        1: array("i", ids[:SHARED] + ids[60 : 60 + short - SHARED]),
        2: array("i", ids[120 : 120 + other]),
    }


def _distance(found: Tensor, expected: Tensor) -> float:
    apart = float((found.float() - expected.float()).norm() / expected.float().norm())
    return apart if apart == apart else float("inf")
