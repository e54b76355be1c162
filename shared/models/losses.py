"""The losses of training, per token, with their metrics.

Each is a pure function of `lp`, the log-probability of each target under the weights being trained, fp32 [n], and of
what came with the datum. The loss of a batch is the plain sum over its tokens, never a mean, so that batches can be
split; per-token weights and advantages carry any normalisation. r = exp(lp - q) is the ratio to the sampling policy q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.contracts.training import LossSpec
from shared.errors import UserError


@dataclass(frozen=True)
class Given:
    """What a loss reads beside `lp`, each fp32 [n]."""

    weights: Tensor
    """Weight of each token; for the policy losses a mask of 0 and 1."""
    logprobs: Tensor
    """q, log-probabilities under the sampling policy; zeros for `cross_entropy`."""
    advantages: Tensor
    """A; zeros for `cross_entropy`."""

    def __getitem__(self, tokens: slice | Tensor) -> Given:
        """Return the same for some of the tokens."""
        return Given(self.weights[tokens], self.logprobs[tokens], self.advantages[tokens])

    @classmethod
    def join(cls, parts: Sequence[Given]) -> Given:
        """Put several one behind the other."""
        columns = ((part.weights, part.logprobs, part.advantages) for part in parts)
        return cls(*(torch.cat(column) for column in zip(*columns, strict=True)))

    def to(self, device: torch.device) -> Given:
        """Return it on another device."""
        return Given(self.weights.to(device), self.logprobs.to(device), self.advantages.to(device))


def cross_entropy(lp: Tensor, given: Given, _low: float, _high: float) -> Tensor:
    """-w * lp, [n]. Weights may be negative."""
    return -given.weights * lp


def importance_sampling(lp: Tensor, given: Given, _low: float, _high: float) -> Tensor:
    """-r * A, [n]: the policy gradient corrected for being off policy."""
    return -given.weights * torch.exp(lp - given.logprobs) * given.advantages


def ppo(lp: Tensor, given: Given, low: float, high: float) -> Tensor:
    """-min(r * A, clip(r, low, high) * A), [n] (Schulman et al. 2017, arXiv:1707.06347, equation 7)."""
    ratio = torch.exp(lp - given.logprobs)
    clipped = ratio.clamp(low, high)
    return -given.weights * torch.minimum(ratio * given.advantages, clipped * given.advantages)


def cispo(lp: Tensor, given: Given, low: float, high: float) -> Tensor:
    """-stop_gradient(clip(r, low, high)) * lp * A, [n] (MiniMax-M1, arXiv:2506.13585, equation 4).

    Clipping bounds the weight of a token but never removes its gradient.
    """
    ratio = torch.exp(lp.detach() - given.logprobs).clamp(low, high)
    return -given.weights * ratio * lp * given.advantages


TokenLoss = Callable[[Tensor, Given, float, float], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss with its parameters checked."""

    name: str
    function: TokenLoss
    low: float = 0.0
    high: float = math.inf
    """Bounds of r, for the losses that clip."""

    @property
    def clips(self) -> bool:
        """Whether it bounds r."""
        return self.name in CLIP_DEFAULTS

    @property
    def needs_policy(self) -> bool:
        """Whether it reads `logprobs` and `advantages`."""
        return self.name != "cross_entropy"

    def per_token(self, lp: Tensor, given: Given) -> Tensor:
        """Return the loss of each token, [n]; their sum is the batch's. Differentiable in `lp`."""
        return self.function(lp, given, self.low, self.high)

    def moves(self, given: Given) -> Tensor:
        """Return which tokens can have a gradient, bool [n]: the others are only evaluated."""
        live = given.weights != 0
        return live & (given.advantages != 0) if self.needs_policy else live

    def metrics(self, lp: Tensor, given: Given) -> dict[str, float]:
        """Return the metrics of a batch, each named `what:reduction`. Means are over tokens of weight other than 0.

        `loss:sum`, `tokens:sum`; of a policy loss also `ratio:mean`, `kl:mean` (the estimate q - lp of the divergence
        from the sampling policy) and `entropy_estimate:mean` (-lp); where r is bounded `clipped:mean`, the share of
        tokens whose r is out of bounds. A mean over no tokens is 0.
        """
        kept = given.weights != 0
        tokens = int(kept.sum())
        result = {"loss:sum": float(self.per_token(lp, given).double().sum()), "tokens:sum": float(tokens)}
        if not self.needs_policy:
            return result
        lp, given = lp[kept], given[kept]
        ratio = torch.exp(lp - given.logprobs)
        means = {"ratio": ratio, "kl": given.logprobs - lp, "entropy_estimate": -lp}
        if self.clips:
            means["clipped"] = (ratio < self.low) | (ratio > self.high)
        return result | {
            f"{what}:mean": float(values.double().sum()) / max(1, tokens) for what, values in means.items()
        }


FUNCTIONS: Mapping[str, TokenLoss] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
}

CLIP_DEFAULTS: Mapping[str, tuple[float, float]] = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}
"""Bounds of r where none are given, as Tinker has them."""

# Tinker's clients send the longer names.
_BOUNDS = {"clip_low": "low", "clip_high": "high", "clip_low_threshold": "low", "clip_high_threshold": "high"}


def make_loss(spec: LossSpec) -> Loss:
    """Check a loss's name and parameters. Raise `UserError` for what is unknown, repeated, not finite or reversed."""
    function = FUNCTIONS.get(spec.name)
    if function is None:
        raise UserError(f"loss {spec.name!r} is unknown: choose one of {', '.join(FUNCTIONS)}")
    if spec.name not in CLIP_DEFAULTS:
        if spec.params:
            raise UserError(f"loss {spec.name} has no parameters, but {', '.join(sorted(spec.params))} was given")
        return Loss(spec.name, function)
    low, high = CLIP_DEFAULTS[spec.name]
    bounds = {"low": low, "high": high} | _given_bounds(spec)
    if not 0 <= bounds["low"] <= bounds["high"]:
        raise UserError(f"{spec.name}: clip_low {bounds['low']} must be from 0 to clip_high {bounds['high']}")
    return Loss(spec.name, function, bounds["low"], bounds["high"])


def _given_bounds(spec: LossSpec) -> dict[str, float]:
    bounds: dict[str, float] = {}
    for name, value in spec.params.items():
        if name not in _BOUNDS:
            raise UserError(f"{spec.name} has no parameter {name!r}: it takes clip_low and clip_high")
        if not math.isfinite(value):
            raise UserError(f"{spec.name}: {name} is {value}, it must be a finite number")
        if _BOUNDS[name] in bounds:
            raise UserError(f"{spec.name}: clip_{_BOUNDS[name]} is given twice, under two names")
        bounds[_BOUNDS[name]] = value
    return bounds
