"""The product of a frozen linear layer and the low-rank parts of several adapters.

Everything that multiplies rows with their adapters is in `_add_parts` and `_Adapted.backward`: one loop over the
segments each, to be replaced together when a grouped product is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Part(NamedTuple):
    """Rows `start` to `stop` get scale * B A x added. A is [rank, in], B [out, rank], of any floating dtype."""

    a: Tensor
    b: Tensor
    scale: float
    start: int
    stop: int


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> Tensor:
    """Map x [..., in] with the frozen weight [out, in] and, by row of the flattened x, with the adapters.

    Products are done in x's dtype; gradients come out in the adapters' own. No gradient is computed for the weight.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(part.a.requires_grad for part in parts)):
        spans = [(part.scale, part.start, part.stop) for part in parts]
        tensors = [tensor for part in parts for tensor in (part.a, part.b)]
        return _Adapted.apply(x, weight, bias, spans, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    out = functional.linear(x, weight, bias)
    _add_parts(x.flatten(0, -2), out.view(-1, out.shape[-1]), parts)
    return out


def _add_parts(x: Tensor, out: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Add the low-rank products to out [rows, out] in place; return scale * A x of each part, [its rows, rank]."""
    inner = []
    for a, b, scale, start, stop in parts:
        low = (_rows(x, start, stop) @ a.to(x.dtype).T).mul_(scale)
        _rows(out, start, stop).addmm_(low, b.to(x.dtype).T)
        inner.append(low)
    return inner


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Return the slice, without the work of slicing when it is everything."""
    return x if stop - start == x.shape[0] else x[start:stop]


class _Adapted(torch.autograd.Function):
    """One node for base and adapters: the low-rank gradient is added in place to the base's instead of beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spans: list[tuple[float, int, int]],
        *tensors: Tensor,
    ) -> Tensor:
        parts = [Part(tensors[2 * i], tensors[2 * i + 1], *span) for i, span in enumerate(spans)]
        out = functional.linear(x, weight, bias)
        inner = _add_parts(x.flatten(0, -2), out.view(-1, out.shape[-1]), parts)
        ctx.spans = spans
        ctx.save_for_backward(x, weight, *tensors, *inner)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        count = len(ctx.spans)
        tensors, inner = rest[: 2 * count], rest[2 * count :]
        flat_x, flat_grad = x.flatten(0, -2), grad.flatten(0, -2)
        to_x = flat_grad @ weight if ctx.needs_input_grad[0] else None
        to_tensors: list[Tensor] = []
        for i, (scale, start, stop) in enumerate(ctx.spans):
            a, b = tensors[2 * i], tensors[2 * i + 1]
            rows = _rows(flat_grad, start, stop)
            low = (rows @ b.to(x.dtype)).mul_(scale)
            if to_x is not None:
                _rows(to_x, start, stop).addmm_(low, a.to(x.dtype))
            to_tensors += (low.T @ _rows(flat_x, start, stop)).to(a.dtype), (rows.T @ inner[i]).to(b.dtype)
        return None if to_x is None else to_x.view_as(x), None, None, None, *to_tensors
