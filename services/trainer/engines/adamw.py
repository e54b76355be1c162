"""AdamW as `torch.optim.AdamW` computes it, for one run whose settings may change at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    mean = moments.mean.lerp(gradient, 1 - adam.beta1)
    square = (moments.square * adam.beta2).addcmul_(gradient, gradient, value=1 - adam.beta2)
    size = adam.learning_rate / (1 - adam.beta1**step)
    root = square.sqrt().div_(math.sqrt(1 - adam.beta2**step)).add_(adam.eps)
    decayed = weights * (1 - adam.learning_rate * adam.weight_decay)
    return decayed.addcdiv_(mean, root, value=-size), Moments(mean, square)
