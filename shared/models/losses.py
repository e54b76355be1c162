"""The losses of training, per token, with their metrics.

Each is a pure function of `lp`, the log-probability of each target under the weights being trained, fp32 [n], and of
what came with the datum. The loss of a batch is the plain sum over its tokens, never a mean, so that batches can be
split; per-token weights and advantages carry any normalisation. r = exp(lp - q) is the ratio to the sampling policy q.
docs/losses.md tells when to use which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.contracts.training import LossName, LossSpec
from shared.loss_params import PENALTIES, loss_params

LARGEST_LOG = 80.0
"""Log-ratios beyond this count as this in metrics, which stay finite in fp32 where the loss itself is bounded."""


@dataclass(frozen=True)
class Given:
    """What a loss reads beside `lp`, each fp32 [n]."""

    weights: Tensor
    """Weight of each token; for the policy losses a mask of 0 and 1."""
    logprobs: Tensor
    """q, log-probabilities under the sampling policy; zeros for `cross_entropy`."""
    advantages: Tensor
    """A; zeros for `cross_entropy`."""
    ratio_mask: Tensor
    """1 for the tokens that make up their sequence's ratio s; zeros but for `gspo`."""
    sequence_log_ratio: Tensor
    """log s, for each token that of its sequence. Only `gspo` reads it, and only the log-probabilities of the whole
    sequence tell it; zeros until then."""

    def __getitem__(self, tokens: slice | Tensor) -> Given:
        """Return the same for some of the tokens."""
        return Given(*(column[tokens] for column in self._columns()))

    @classmethod
    def join(cls, parts: Sequence[Given]) -> Given:
        """Put several one behind the other."""
        columns = zip(*(part._columns() for part in parts), strict=True)  # noqa: SLF001 - of the class itself
        return cls(*(torch.cat(column) for column in columns))

    def to(self, device: torch.device) -> Given:
        """Return it on another device."""
        return Given(*(column.to(device) for column in self._columns()))

    def _columns(self) -> tuple[Tensor, ...]:
        return self.weights, self.logprobs, self.advantages, self.ratio_mask, self.sequence_log_ratio


def sequence_log_ratio(lp: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return log s of one sequence, a scalar: the mean of lp - q over the tokens of `mask`; 0 if it marks none.

    All are [N]. exp of it is the geometric mean of the ratios, so that long sequences have no extreme ones (Zheng et
    al. 2025, arXiv:2507.18071, equation 7).
    """
    return ((lp.detach() - logprobs) * mask).sum() / mask.sum().clamp(min=1)


def cross_entropy(lp: Tensor, given: Given) -> Tensor:
    """-w * lp, [n]. Weights may be negative."""
    return -given.weights * lp


def importance_sampling(lp: Tensor, given: Given) -> Tensor:
    """-r * A, [n]: the policy gradient corrected for being off policy."""
    return -given.weights * torch.exp(lp - given.logprobs) * given.advantages


def ppo(lp: Tensor, given: Given, clip_low: float, clip_high: float) -> Tensor:
    """-min(r * A, clip(r, low, high) * A), [n] (Schulman et al. 2017, arXiv:1707.06347, equation 7)."""
    return _clipped(torch.exp(lp - given.logprobs), given, clip_low, clip_high)


def cispo(lp: Tensor, given: Given, clip_low: float, clip_high: float) -> Tensor:
    """-stop_gradient(clip(r, low, high)) * lp * A, [n] (MiniMax-M1, arXiv:2506.13585, equation 4).

    Clipping bounds the weight of a token but never removes its gradient.
    """
    ratio = torch.exp(lp.detach() - given.logprobs).clamp(clip_low, clip_high)
    return -given.weights * ratio * lp * given.advantages


def dro(lp: Tensor, given: Given, beta: float) -> Tensor:
    """-(lp * A - beta / 2 * (lp - q)^2), [n] (Richemond et al. 2024, arXiv:2405.19107; as Tinker has it).

    No ratio appears, so data may come from anywhere; the square keeps the policy near what sampled them.
    """
    return -given.weights * lp * given.advantages + dro_penalty(lp, given, beta)


def dro_penalty(lp: Tensor, given: Given, beta: float) -> Tensor:
    """The square in it, beta / 2 * (lp - q)^2, [n]."""
    return given.weights * (0.5 * beta) * (lp - given.logprobs).square()


def gspo(lp: Tensor, given: Given, clip_low: float, clip_high: float) -> Tensor:
    """-min(s_t * A, clip(s_t, low, high) * A), [n] (Zheng et al. 2025, arXiv:2507.18071, equations 14 and 15).

    s_t has the value of the whole sequence's ratio s, and the gradient of its own token: s * lp / stop_gradient(lp).
    """
    return _clipped(torch.exp(given.sequence_log_ratio + (lp - lp.detach())), given, clip_low, clip_high)


def stable_reinforce(lp: Tensor, given: Given, clip_high: float, kl_coeff: float) -> Tensor:
    """-stop_gradient(min(r, high)) * lp * A + kl_coeff * penalty, [n]: a formula of this project.

    Truncated importance weights (Espeholt et al. 2018, arXiv:1802.01561, section 4.1) bound the step of a token, and a
    penalty brings back those that have drifted away from the policy that sampled them.
    """
    weight = torch.exp((lp.detach() - given.logprobs).clamp(max=math.log(clip_high)))
    return -given.weights * weight * lp * given.advantages + kl_penalty(lp, given, clip_high, kl_coeff)


def kl_penalty(lp: Tensor, given: Given, clip_high: float, kl_coeff: float) -> Tensor:
    """The pull in it, kl_coeff * h, [n]: h = r - 1 - log r up to r = high, and from there a straight line in log r.

    Over samples from q, r - 1 - log r estimates KL(q || p) without bias and is never negative (Schulman 2020,
    "Approximating KL divergence", k3). What is sampled from does not depend on the weights, so its gradient, (r - 1)
    times that of lp, has no bias either; and prefixes come from q as well, so that the sum over tokens is the
    divergence of whole sequences. The straight line bounds the gradient as the weights of the policy gradient are
    bounded: min(r, high) - 1.
    """
    log_ratio = lp - given.logprobs
    bent = log_ratio.clamp(max=math.log(clip_high))
    return given.weights * kl_coeff * (torch.exp(bent) - 1 - bent + (clip_high - 1) * (log_ratio - bent))


def _clipped(ratio: Tensor, given: Given, low: float, high: float) -> Tensor:
    clipped = ratio.clamp(low, high)
    return -given.weights * torch.minimum(ratio * given.advantages, clipped * given.advantages)


TokenLoss = Callable[..., Tensor]
"""Of `lp`, `Given` and the loss's parameters by name."""

FUNCTIONS: Mapping[LossName, TokenLoss] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
    "stable_reinforce": stable_reinforce,
}

PENALTY_FUNCTIONS: Mapping[LossName, TokenLoss] = {"dro": dro_penalty, "stable_reinforce": kl_penalty}
"""The part of a loss that does not depend on advantages."""


@dataclass(frozen=True)
class Loss:
    """A loss with its parameters checked."""

    name: LossName
    params: Mapping[str, float]

    @property
    def needs_policy(self) -> bool:
        """Whether it reads `logprobs` and `advantages`."""
        return self.name != "cross_entropy"

    @property
    def needs_sequences(self) -> bool:
        """Whether it reads `sequence_log_ratio`, so that the whole sequence must be known before its gradient is."""
        return self.name == "gspo"

    @property
    def penalises(self) -> bool:
        """Whether tokens with an advantage of 0 have a gradient too."""
        return any(self.params[name] > 0 for name in PENALTIES & self.params.keys())

    def per_token(self, lp: Tensor, given: Given) -> Tensor:
        """Return the loss of each token, [n]; their sum is the batch's. Differentiable in `lp`."""
        return FUNCTIONS[self.name](lp, given, **self.params)

    def moves(self, given: Given) -> Tensor:
        """Return which tokens can have a gradient, bool [n]: the others are only evaluated."""
        live = given.weights != 0
        return live & (given.advantages != 0) if self.needs_policy and not self.penalises else live

    def metrics(self, lp: Tensor, given: Given) -> dict[str, float]:
        """Return the metrics of a batch, each named `what:reduction`. They count tokens of weight other than 0.

        A mean is over tokens, so those of two batches are joined with `tokens:sum` as weights; over no tokens it is 0.
        Which loss has which, docs/losses.md says.
        """
        kept = given.weights != 0
        tokens = int(kept.sum())
        totals = {"loss": self.per_token(lp, given), "tokens": kept}
        lp, given = lp[kept], given[kept]
        if not self.needs_policy:
            totals["weights"] = given.weights
            return _sums(totals) | _means({"nll": -lp}, tokens)
        if self.name in PENALTY_FUNCTIONS:
            totals["penalty"] = PENALTY_FUNCTIONS[self.name](lp, given, **self.params)
        ratio = torch.exp((lp - given.logprobs).clamp(max=LARGEST_LOG))
        means = {"ratio": ratio, "kl": given.logprobs - lp, "entropy_estimate": -lp, **self._bounded(ratio, given)}
        highest = {"ratio:max": float(ratio.max()) if tokens else 0.0}
        return _sums(totals) | _means(means, tokens) | highest

    def _bounded(self, ratio: Tensor, given: Given) -> dict[str, Tensor]:
        """Return what is known of the ratio that the loss bounds, if it bounds one."""
        if self.needs_sequences:
            ratio = torch.exp(given.sequence_log_ratio.clamp(max=LARGEST_LOG))
        elif "clip_high" not in self.params:
            return {}
        clipped = (ratio < self.params.get("clip_low", 0.0)) | (ratio > self.params["clip_high"])
        return {"clipped": clipped} | ({"sequence_ratio": ratio} if self.needs_sequences else {})


def _sums(totals: Mapping[str, Tensor]) -> dict[str, float]:
    return {f"{what}:sum": float(values.double().sum()) for what, values in totals.items()}


def _means(columns: Mapping[str, Tensor], count: int) -> dict[str, float]:
    return {f"{what}:mean": float(values.double().sum()) / max(1, count) for what, values in columns.items()}


def make_loss(spec: LossSpec) -> Loss:
    """Check a loss's name and parameters. Raise `UserError` for what is unknown, repeated, not finite or reversed."""
    return Loss(spec.name, loss_params(spec.name, spec.params))
