"""All layers of a model by our own functions: the body that trainers use on a GPU.

The functions are compiled, once for all layers. Where launching kernels costs more than running them, as with small
models, the whole of a pass is captured in CUDA graphs (`graphs.Captured`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from services.trainer.engines.fused.graphs import Graphs, roomy
from services.trainer.engines.fused.layer import (
    FAMILIES,
    Layer,
    LayerShape,
    LayerWeights,
    Rows,
    factor,
    make_layer,
    rms_norm,
)
from services.trainer.engines.fused.projections import join, kind_shapes
from services.trainer.engines.fused.stacks import RANKS, Stacks, stack_rank
from services.trainer.engines.run_state import RunState
from shared.models.packing import Packed, Tree
from shared.models.varlen import documents

SHARE_ALWAYS = 2**40
"""Pairs of tokens per token: a shared prefix costs nothing here."""


@dataclass(frozen=True)
class FusedOptions:
    """How the layers are run. None of it changes results beyond rounding."""

    compile: bool = False
    graphs: bool = False
    recompute_rows: int | None = None
    """Passes of more rows than this keep only the hidden states between layers and compute the rest again on the way
    back. None: never."""
    share_prefixes: bool = True
    dense_ranks: int = 128
    """Ranks of all runs of a pass together up to which their adapters are one product; above they are grouped ones."""


def supported(model: PreTrainedModel) -> bool:
    """Whether `FusedLayers` can run the model."""
    if model.config.model_type not in FAMILIES:
        return False
    try:
        kind_shapes(model.base_model.layers)
    except ValueError:
        return False
    return True


class FusedLayers:
    """A `Body` (see there)."""

    masks = False

    def __init__(self, model: PreTrainedModel, options: FusedOptions) -> None:
        """Join the model's projections. The model must be `supported`."""
        self.pairs_per_token = SHARE_ALWAYS if options.share_prefixes else None
        self._options = options
        self._inner: Any = model.base_model
        self._eps = float(model.config.rms_norm_eps)
        self._shapes = kind_shapes(self._inner.layers)
        self._norm = factor(self._inner.norm)
        room = max(options.dense_ranks, RANKS[-1])
        weights = [_weights(layer, joined) for layer, joined in zip(self._inner.layers, join(model, room), strict=True)]
        self._layers = list(zip(_functions(model, options), weights, strict=True))
        self._stacks: dict[tuple[int, int], Stacks] = {}
        self._graphs = Graphs() if options.graphs else None
        self._finite: list[Tensor] = []
        self._last: tuple[Stacks, Callable[[Tensor], Sequence[Tensor]]] | None = None
        self._left: tuple[Stacks, Sequence[Tensor]] | None = None

    @contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Run passes kernel by kernel for a while."""
        graphs, self._graphs = self._graphs, None
        try:
            yield
        finally:
            self._graphs = graphs

    def forward(
        self, packed: Packed, trees: Sequence[Tree], states: Mapping[str, RunState], *, backward: bool
    ) -> Tensor:
        """See `Body.forward`."""
        device = self._norm.device
        present = [states[str(run)] for run, _, _ in packed.segments]
        stacks = self._stacks_for(present)
        stacks.fill(present)
        ends = [stop for _, _, stop in packed.segments]
        ends += [ends[-1]] * (stacks.places - len(ends))
        with torch.no_grad():
            x = self._inner.embed_tokens(packed.tokens)
            cos, sin = (part[0] for part in self._inner.rotary_emb(x[None], packed.positions[None]))
        rows = Rows(cos, sin, documents(trees, packed.rows, device), torch.tensor(ends, dtype=torch.int32).to(device))
        hidden, back = self._run(x, rows, stacks, backward=backward)
        self._finite = [hidden.sum(dtype=torch.float32)] if len(present) > 1 and stacks.dense else []
        self._last, self._left = (stacks, back), None
        return hidden

    def _run(
        self, x: Tensor, rows: Rows, stacks: Stacks, *, backward: bool
    ) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
        """Return hidden states and what leads back from their gradient to that of `stacks.tensors`."""
        if self._graphs is not None:
            return self._graphs.run(lambda y, r: self._compute(y, r, stacks), x, rows, stacks, backward=backward)
        with torch.set_grad_enabled(backward):
            hidden = self._compute(x.requires_grad_(backward), rows, stacks)
        return hidden.detach(), lambda gradient: torch.autograd.grad(hidden, stacks.tensors, gradient)

    def _compute(self, x: Tensor, rows: Rows, stacks: Stacks) -> Tensor:
        limit = self._options.recompute_rows
        if stacks.places > 1 and stacks.dense:
            rows = rows._replace(
                owners=torch.searchsorted(rows.ends, torch.arange(len(x), device=x.device), right=True)
            )
        recompute = limit is not None and len(x) > limit and torch.is_grad_enabled()
        for (layer, weights), stack in zip(self._layers, stacks.leaves, strict=True):
            if recompute:
                x = checkpoint(layer, x, weights, stack, rows, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, weights, stack, rows)
        return rms_norm(x, self._norm, self._eps)

    def backward(self, gradient: Tensor) -> None:
        """See `Body.backward`."""
        assert self._last is not None, "nothing was computed"
        (stacks, back), self._last = self._last, None
        self._left = stacks, back(gradient)

    def gradients(self, states: Mapping[str, RunState]) -> dict[str, Tensor]:
        """See `Body.gradients`; `states` are in the order in which they were computed."""
        assert self._left is not None, "there was no backward pass"
        (stacks, leaves), self._left = self._left, None
        vectors = stacks.gradients(leaves, list(states.values()))
        for vector, state in zip(vectors, states.values(), strict=True):
            if state.adapter.spec.train_unembed:
                vector.add_(state.take_gradient())  # what the unembedding left
        if self._finite:
            self._finite += [vector.sum() for vector in vectors]
        return dict(zip(states, vectors, strict=True))

    def spoiled(self) -> bool:
        """See `Body.spoiled`."""
        return bool(self._finite) and not torch.stack(self._finite).isfinite().all().item()

    def forget(self, states: Mapping[str, RunState]) -> None:
        """See `Body.forget`."""
        self._last = self._left = None
        for state in states.values():
            state.forget_gradient()

    def _stacks_for(self, states: Sequence[RunState]) -> Stacks:
        """Return stacks that hold these runs: kept, since captured graphs read them where they lie."""
        places = roomy(len(states))
        rank = stack_rank([state.adapter.spec.rank for state in states])
        if (places, rank) not in self._stacks:
            wide = [[weight for weight, _ in weights.projections] for _, weights in self._layers]
            dense = places == 1 or places * rank <= self._options.dense_ranks
            self._stacks[places, rank] = Stacks(self._shapes, wide, places, rank, dense=dense)
        return self._stacks[places, rank]


def _weights(layer: nn.Module, joined: Sequence[Any]) -> LayerWeights:
    attention: Any = layer.self_attn
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    norm_q, norm_k = (None if norm is None else factor(norm) for norm in norms)
    return LayerWeights(
        projections=tuple((projection.wide, projection.bias) for projection in joined),
        norm_in=factor(layer.input_layernorm),  # type: ignore[arg-type]
        norm_mlp=factor(layer.post_attention_layernorm),  # type: ignore[arg-type]
        norm_q=norm_q,
        norm_k=norm_k,
    )


def _functions(model: PreTrainedModel, options: FusedOptions) -> list[Layer]:
    """Return the function of each layer: one for all that have the same window."""
    by_shape: dict[LayerShape, Layer] = {}
    functions = []
    for layer in model.base_model.layers:
        shape = _layer_shape(model, layer)
        if shape not in by_shape:
            function = make_layer(shape, layer.mlp.act_fn)
            by_shape[shape] = _compiled(function) if options.compile else function
        functions.append(by_shape[shape])
    return functions


def _compiled(function: Layer) -> Layer:
    # One run or many, shared prefixes or not, with and without gradients, and every size of `graphs.rounded`.
    torch._dynamo.config.recompile_limit = max(512, torch._dynamo.config.recompile_limit)  # noqa: SLF001 - no other way
    # Kernels for any size were seen to make a pass three times as slow as kernels for its own. And the compiler's
    # patterns join a product with the sum behind it in a way that copies a whole tensor first.
    return torch.compile(function, dynamic=False, options={"pattern_matcher": False})


def _layer_shape(model: PreTrainedModel, layer: nn.Module) -> LayerShape:
    attention: Any = layer.self_attn
    inherited: int | None = getattr(model.config, "sliding_window", None)  # Qwen's layers differ, Mistral's do not
    return LayerShape(
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        eps=float(model.config.rms_norm_eps),
        window=attention.sliding_window if hasattr(attention, "sliding_window") else inherited,
    )
