"""AdamW as `torch.optim.AdamW` computes it, for one run whose settings may change at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from shared.contracts.training import AdamParams


@dataclass(frozen=True)
class Moments:
    """Running means of the gradient and of its square, fp32, shaped as the weights."""

    mean: Tensor
    square: Tensor


def clipped(gradient: Tensor, norm: Tensor, limit: float) -> Tensor:
    """Scale a gradient of this L2 norm down to `limit`, as `torch.nn.utils.clip_grad_norm_` does; 0: no limit."""
    return gradient * (limit / (norm + 1e-6)).clamp(max=1.0) if limit else gradient


def adamw(weights: Tensor, gradient: Tensor, moments: Moments, step: int, adam: AdamParams) -> tuple[Tensor, Moments]:
    """Return the weights and moments after step number `step`, counted from 1; the arguments stay as they are.

    Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2: weights decay by lr * weight_decay, apart from the
    gradient, then move by lr * m / (sqrt(v) + eps) with bias-corrected moments.
    """
    numbers = (
        1 - adam.beta1,
        adam.beta2,
        1 - adam.beta2,
        -adam.learning_rate / (1 - adam.beta1**step),
        1 / math.sqrt(1 - adam.beta2**step),
        adam.eps,
        1 - adam.learning_rate * adam.weight_decay,
    )
    if weights.is_cuda:
        given = torch.tensor(numbers).pin_memory().to(weights.device, non_blocking=True)
        new, mean, square = _compiled()(weights, gradient, moments.mean, moments.square, *given.unbind())
    else:
        new, mean, square = _arithmetic(weights, gradient, moments.mean, moments.square, *numbers)
    return new, Moments(mean, square)


def _arithmetic(
    weights: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    fresh: float | Tensor,
    kept: float | Tensor,
    added: float | Tensor,
    size: float | Tensor,
    root: float | Tensor,
    eps: float | Tensor,
    decay: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.lerp(mean, gradient, fresh)
    square = square * kept + gradient * gradient * added
    return weights * decay + size * (mean / (square.sqrt() * root + eps)), mean, square


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    # With large adapters a step is nothing but moving bytes, of which one kernel moves a third.
    return torch.compile(_arithmetic, dynamic=True)
