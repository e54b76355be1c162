"""Attention over documents of different lengths that lie one behind the other, without padding or masks.

A document's queries are the rows that it adds to the pass; its keys are all rows of its path, those that it shares with
documents before it gathered once more. So rows are shared, and no pair of tokens is computed that is not needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from shared.models.packing import Tree

_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


class Documents(NamedTuple):
    """The documents of a pass. Document i has the last of its keys in common with its queries."""

    query_ends: Tensor
    """int32 [documents + 1] from 0: document i has the query rows between entries i and i + 1."""
    key_ends: Tensor
    """The same for its keys."""
    longest_query: int
    longest_key: int
    keys: Tensor | None
    """int64: for each key the row that it is taken from. None: keys are the query rows."""


def documents(trees: Sequence[Tree], rows: dict[int, Tensor], device: torch.device | str) -> Documents:
    """Return the documents of packed trees; `rows` as `Packed` has them."""
    branches = [branch for tree in trees for branch in tree.branches]
    queries, keys = [branch.added for branch in branches], [branch.length for branch in branches]
    shared = queries != keys
    return Documents(
        query_ends=_ends(queries, device),
        key_ends=_ends(keys, device),
        longest_query=max(queries),
        longest_key=max(keys),
        keys=torch.cat([rows[branch.sequence] for branch in branches]).to(device) if shared else None,
    )


def _ends(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Documents, *, scale: float, window: int | None) -> Tensor:
    """Attend causally within each document: q [rows, heads, dim], k and v [rows, kv heads, dim]; as q.

    `window` counts positions, the own one included.
    """
    if layout.keys is not None:
        k, v = _gathered(k, layout.keys), _gathered(v, layout.keys)
    if q.is_cuda:
        return _flash(q, k, v, layout, scale, window)
    return _one_by_one(q, k, v, layout, scale, window)


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    # In fp32, so that the gradients of all who share a row are added without rounding.
    return x.float().index_select(0, rows).to(x.dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: Documents, scale: float, window: int | None) -> Tensor:
    # Releases that do not ask whether heads are grouped serve grouped ones all the same.
    options: dict[str, Any] = {"enable_gqa": True} if k.shape[1] < q.shape[1] and _TAKES_GQA else {}
    out = varlen_attn(
        q,
        k,
        v,
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    assert isinstance(out, Tensor)
    return out


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, layout: Documents, scale: float, window: int | None) -> Tensor:
    """Attend to each document by itself: what the kernel computes, where there is no kernel."""
    queries, keys = layout.query_ends.diff().tolist(), layout.key_ends.diff().tolist()
    parts = zip(torch.split(q, queries), torch.split(k, keys), torch.split(v, keys), strict=True)
    return torch.cat([_document(*part, scale=scale, window=window) for part in parts])


def _document(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    shared = len(k) - len(q)
    near = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(shared)
    if window is not None:
        near = near.triu(shared - window + 1)
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
