"""Log-probabilities of chosen tokens, without ever holding the logits of a whole pass.

A vocabulary is so large that the logits of all tokens would outweigh everything else in memory. The unembedding is
applied to a chunk of rows at a time, forward and backward, before the next chunk begins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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

    logits is [rows, vocabulary], `rows` and `targets` are int64 [n]. Logits may be destroyed, so nothing else may use
    them, and the backward pass can run only once.
    """
    function = _Fused if logits.is_cuda else _InPlace
    return function.apply(logits, rows, targets)  # type: ignore[no-any-return, no-untyped-call]


class _InPlace(torch.autograd.Function):
    """Turns the logits into probabilities and those into the gradient, all in one place.

    On a CPU fresh memory of this size costs more than the arithmetic on it, and exponentials are computed once.
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


class _Fused(torch.autograd.Function):
    """Reads the logits twice forward and once backward, in compiled kernels, whatever the number of operations.

    On a GPU memory traffic is what counts, and exponentials are cheap enough to be computed again.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        total = _log_totals()(logits)
        ctx.save_for_backward(logits, total, rows, targets)
        return logits[rows, targets].float() - total[rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, total, rows, targets = ctx.saved_tensors
        by_row = torch.zeros_like(total).index_add_(0, rows, grad)
        out = _softmax_gradient()(logits, total, by_row)
        out.index_put_((rows, targets), grad.to(out.dtype), accumulate=True)
        return out, None, None


@cache
def _log_totals() -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda logits: torch.logsumexp(logits.float(), dim=-1), dynamic=True)


@cache
def _softmax_gradient() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def gradient(logits: Tensor, total: Tensor, by_row: Tensor) -> Tensor:
        return (-by_row[:, None] * torch.exp(logits.float() - total[:, None])).to(logits.dtype)

    return torch.compile(gradient, dynamic=True)
