"""One decoder layer of the Llama, Mistral, Qwen2, Qwen3 and Gemma families, as a pure function of tensors.

It takes packed rows of many documents and many runs. Being one function for all layers of a model, it is compiled
once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.models.varlen import Documents, attend

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")


@dataclass(frozen=True)
class LayerShape:
    """The constants of a layer."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    eps: float
    window: int | None
    """Positions that a token sees, its own included. None: all before it."""


class LayerWeights(NamedTuple):
    """The frozen weights of a layer. Those of the norms are fp32 factors."""

    projections: tuple[tuple[Tensor, Tensor | None], ...]
    """Of each of `KINDS` the weight with room for adapters behind it (`Projection.wide`), and the bias."""
    norm_in: Tensor
    norm_mlp: Tensor
    norm_q: Tensor | None
    norm_k: Tensor | None


class Rows(NamedTuple):
    """What a pass says of its rows, the same for every layer."""

    cos: Tensor
    """[rows, head_dim], as is `sin`: the rotary embedding of each row's position."""
    sin: Tensor
    documents: Documents
    ends: Tensor
    """int32 [runs]: behind the last row of each run; rows are sorted by run."""
    owners: Tensor | None = None
    """int64 [rows]: the run of each row. None: there is one run."""


Stack = tuple[Tensor, Tensor]
"""The adapters of all runs for one kind, see `Stacks`."""

Layer = Callable[[Tensor, LayerWeights, tuple[Stack, ...], Rows], Tensor]


def make_layer(shape: LayerShape, activation: Callable[[Tensor], Tensor]) -> Layer:
    """Return the function of a layer: hidden states [rows, hidden] to hidden states."""

    def layer(x: Tensor, weights: LayerWeights, stacks: tuple[Stack, ...], rows: Rows) -> Tensor:
        qkv, out, gate_up, down = zip(weights.projections, stacks, strict=True)
        heads = _attention(project(rms_norm(x, weights.norm_in, shape.eps), *qkv, rows), weights, rows, shape)
        x = x + project(heads, *out, rows)
        gate, up = project(rms_norm(x, weights.norm_mlp, shape.eps), *gate_up, rows).chunk(2, dim=-1)
        return x + project(activation(gate) * up, *down, rows)

    return layer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last axis, computed in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def factor(norm: nn.Module) -> Tensor:
    """Return the fp32 factor of a norm module: Gemma's count from 1."""
    weight: Tensor = norm.weight.detach().float()  # type: ignore[operator]
    return 1.0 + weight if type(norm).__name__.startswith("Gemma") else weight


def project(x: Tensor, frozen: tuple[Tensor, Tensor | None], stack: Stack, rows: Rows) -> Tensor:
    """Map x [rows, in] to [rows, out] by a frozen layer and, run by run, the adapters of its stack."""
    (wide, bias), (a, b) = frozen, stack
    if b.dim() == 2:
        mask = None if rows.owners is None else _own_columns(rows.owners, a)
        return _Dense.apply(x, wide, bias, a.flatten(0, 1), b, mask)  # type: ignore[no-any-return, no-untyped-call]
    base = functional.linear(x, wide[:, : x.shape[1]], bias)
    low = functional.grouped_mm(x, a.transpose(1, 2), offs=rows.ends)
    return base + functional.grouped_mm(low, b.transpose(1, 2), offs=rows.ends)


def _own_columns(owners: Tensor, a: Tensor) -> Tensor:
    """Return which columns of x A^T are of a row's own run, bool [rows, runs * rank], for A [runs, rank, in]."""
    columns = torch.arange(a.shape[0] * a.shape[1], device=a.device)
    return owners[:, None] == columns // a.shape[1]


class _Dense(torch.autograd.Function):
    """x W^T + (x A^T) B^T as one product of [x, x A^T] with [W, B], for the adapters of all runs together.

    A row keeps only what its own run's A gives. Other runs' B then meet zeros, which changes nothing as long as all is
    finite; `FusedLayers.spoiled` tells when it is not. B is read from behind W; `b` is there for its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wide: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor | None
    ) -> Tensor:
        low = x @ a.T
        joined = torch.cat((x, low if mask is None else torch.where(mask, low, 0)), dim=1)
        ctx.save_for_backward(joined, wide, a, mask)
        return functional.linear(joined, wide[:, : joined.shape[1]], bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        joined, wide, a, mask = ctx.saved_tensors
        inputs = a.shape[1]
        back = grad @ wide[:, : joined.shape[1]]
        low = back[:, inputs:] if mask is None else torch.where(mask, back[:, inputs:], 0)
        return back[:, :inputs] + low @ a, None, None, low.T @ joined[:, :inputs], grad.T @ joined[:, inputs:], None


def _attention(qkv: Tensor, weights: LayerWeights, rows: Rows, shape: LayerShape) -> Tensor:
    widths = [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim]
    q, k, v = (torch.unflatten(part, -1, (-1, shape.head_dim)) for part in torch.split(qkv, widths, dim=-1))
    if weights.norm_q is not None and weights.norm_k is not None:
        q, k = rms_norm(q, weights.norm_q, shape.eps), rms_norm(k, weights.norm_k, shape.eps)
    q, k = _rotated(q, rows), _rotated(k, rows)
    return attend(q, k, v, rows.documents, scale=shape.scaling, window=shape.window).flatten(1)


def _rotated(x: Tensor, rows: Rows) -> Tensor:
    """Turn [rows, heads, dim] by each row's position (Su et al. 2021, arXiv:2104.09864), halves paired."""
    first, second = x.chunk(2, dim=-1)
    return x * rows.cos[:, None] + torch.cat((-second, first), dim=-1) * rows.sin[:, None]
