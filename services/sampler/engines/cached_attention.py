"""Attention over a `RowCache`, as an attention implementation of transformers.

It does for every architecture what transformers' own implementations cannot: queries of a batch in another order than
the rows of the cache, grouped-query heads without copying keys and values, and masks that are made once for all layers.
Sliding windows and soft-capped scores follow what each layer passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from services.sampler.engines.kv_cache import DecodeStep, PrefillStep

NAME = "openrl_rows"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: PrefillStep | DecodeStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with query [b, heads, T, size] to key and value [b, kv heads, L, size] of `RowCache.update`.

    `attention_mask` is None, since transformers makes no mask for an implementation that it does not know; `step` is
    the keyword argument given to the model. Return [b, T, heads, size].
    """
    assert attention_mask is None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(step, PrefillStep):
        return _prefill(query, key, value, step, scale, sliding_window, softcap).transpose(1, 2).contiguous(), None
    return _decode(query, key, value, step, scale, sliding_window, softcap).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, step: PrefillStep, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """Attend causally inside each prompt. Padding stands on the right, where nothing that counts can see it."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if cap is None and (window is None or window >= length):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1)
    window = length if window is None else window
    if window not in step.masks:
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        step.masks[window] = causal.triu(1 - window)
    mask = step.masks[window]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if cap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return _soft_capped(query, key, value, bias, scale, cap)


def _decode(
    query: Tensor, key: Tensor, value: Tensor, step: DecodeStep, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """Attend with one token of each row; the query heads that share a key stand where a sequence's tokens would."""
    rows, heads, _, size = query.shape
    if step.batch_of_row is not None:
        query = query[step.batch_of_row]
    query = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    mask = _decode_mask(step, window, query.dtype)
    if cap is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        out = _soft_capped(query, key, value, mask, scale, cap)
    out = out.reshape(rows, heads, 1, size)
    return out if step.batch_of_row is None else out[step.rows]


def _decode_mask(step: DecodeStep, window: int | None, dtype: torch.dtype) -> Tensor:
    if window is not None and window >= step.length:
        window = None
    if window not in step.masks:
        places = torch.arange(step.length, device=step.row_positions.device)
        last = step.row_positions[:, None]
        hidden = places > last
        if window is not None:
            hidden |= places <= last - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        step.masks[window] = mask[:, None, None, :]
    return step.masks[window]


def _soft_capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Attend with scores cap * tanh(score / cap), Gemma 2's (arXiv:2408.00118), which SDPA does not know."""
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / cap)) * cap + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value
