"""Log-probabilities of chosen tokens, without ever holding the logits of a whole pass.

A vocabulary is so large that the logits of all tokens would outweigh everything else in memory. The unembedding is
applied to a chunk of rows at a time, forward and backward, before the next chunk begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Unembed = Callable[[Tensor], Tensor]
"""Maps hidden states [rows, hidden] to logits [rows, vocabulary]."""


def unembedding(model: PreTrainedModel) -> Unembed:
    """Return the map from last hidden states to logits, with the soft cap that Gemma 2 puts on them."""
    head: nn.Module = model.get_output_embeddings()
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    if cap is None:
        return head
    return lambda hidden: torch.tanh(head(hidden) / cap) * cap


def target_logprobs(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(logits)[rows, targets] in fp32, [n]; several pairs may name one row.

    logits is [rows, vocabulary], `rows` and `targets` are int64 [n]. Logits in fp32 are destroyed, so nothing else may
    use them, and the backward pass can run only once.
    """
    return _TargetLogprobs.apply(logits, rows, targets)  # type: ignore[no-any-return, no-untyped-call]


class _TargetLogprobs(torch.autograd.Function):
    """Turns the logits into probabilities and those into the gradient, all in one place.

    Fresh memory of this size costs more than the arithmetic on it, and exponentials are computed once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        picked = logits[rows, targets].float()
        highest = logits.amax(dim=-1, keepdim=True).float()
        scores = logits.detach().float().sub_(highest).exp_()  # in fp32 no copy
        total = scores.sum(dim=-1)
        ctx.save_for_backward(total, rows, targets)
        ctx.scores, ctx.dtype = scores, logits.dtype
        return picked - (highest[:, 0] + total.log())[rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total, rows, targets = ctx.saved_tensors
        scores = ctx.scores
        del ctx.scores
        # d lp / d logits = onehot(target) - softmax(logits)
        by_row = torch.zeros_like(total).index_add_(0, rows, grad).div_(total)
        out: Tensor = scores.mul_(-by_row[:, None])
        out.index_put_((rows, targets), grad, accumulate=True)
        return out.to(ctx.dtype), None, None
