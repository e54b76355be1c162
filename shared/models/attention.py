"""Attention over packed trees, plugged into transformers' models under the name `PACKED`.

A model that uses it gets one row of tokens and, as the keyword `packed`, their layout. Every tree is attended to by
itself: nothing is padded, no mask spans the whole row, and a tree costs the square of its own length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from shared.models.packing import Block, Packed

PACKED = "openrl_packed"


def hidden_states(model: PreTrainedModel, packed: Packed) -> Tensor:
    """Run the model without its unembedding; return [rows, hidden], after the last norm.

    The model must have been loaded with any attention; from the first call on it uses this one.
    """
    if model.config._attn_implementation != PACKED:  # noqa: SLF001 - transformers has no public way to read it
        AttentionInterface.register(PACKED, packed_attention)
        model.set_attn_implementation(PACKED)
    output = model.base_model(
        input_ids=packed.tokens[None],
        position_ids=packed.positions[None],
        use_cache=False,
        packed=packed,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    packed: Packed,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend block by block: query [1, heads, rows, dim], key and value [1, kv heads, rows, dim].

    Return [1, rows, heads, dim]. `sliding_window` counts positions, the own one included; `softcap` bounds scores.
    """
    outputs = []
    for block in packed.blocks:
        q, k, v = (tensor[:, :, block.start : block.stop] for tensor in (query, key, value))
        mask = _windowed(block, packed.positions, sliding_window)
        outputs.append(_attend(q, k, v, mask, scaling) if softcap is None else _capped(q, k, v, mask, scaling, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _windowed(block: Block, positions: Tensor, window: int | None) -> Tensor | None:
    """Return the block's mask, narrowed if any of its sequences is longer than the window."""
    if window is None or block.stop - block.start <= window:
        return block.mask
    place = positions[block.start : block.stop]
    distance = place[:, None] - place
    near = distance < window
    return near & (block.mask if block.mask is not None else distance >= 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None and q.is_cuda:
        # CUDA's fused kernels take a mask or grouped heads, not both
        k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
    )


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, cap: float) -> Tensor:
    """Attend with scores bounded to ±cap by tanh (Gemma 2, arXiv:2408.00118), which SDPA cannot do."""
    groups, rows = q.shape[1] // k.shape[1], q.shape[2]
    scores = q @ k.repeat_interleave(groups, dim=1).transpose(2, 3) * (scaling or q.shape[-1] ** -0.5)
    allowed = mask if mask is not None else torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
    bounded = torch.tanh(scores / cap).mul(cap).masked_fill(~allowed, float("-inf"))
    weights = bounded.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v.repeat_interleave(groups, dim=1)
