"""The losses and their metrics written out token by token, as docs/losses.md has them, to compare the engine's with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shared.contracts.training import Datum, LossSpec

BOUNDS = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0), "gspo": (0.8, 1.2), "stable_reinforce": (0.0, 2.0)}


def loss_of(lp: Tensor, datum: Datum, loss: LossSpec) -> Tensor:
    """Return the loss of one sequence, written out as docs/losses.md has it, token by token."""
    weights = list(datum.weights) if datum.weights is not None else [1.0] * len(lp)
    if loss.name == "cross_entropy":
        return torch.stack([-weight * each for weight, each in zip(weights, lp, strict=True)]).sum()
    assert datum.advantages is not None
    assert datum.logprobs is not None
    mask = list(datum.ratio_mask) if datum.ratio_mask is not None else weights
    logs = [each.item() - q for each, q, marked in zip(lp, datum.logprobs, mask, strict=True) if marked]
    s = math.exp(sum(logs) / len(logs)) if logs else 1.0
    terms = [
        token_loss(each, q, advantage, s, loss) if weight else each * 0
        for each, q, advantage, weight in zip(lp, datum.logprobs, datum.advantages, weights, strict=True)
    ]
    return torch.stack(terms).sum()


def token_loss(lp: Tensor, q: float, advantage: float, s: float, loss: LossSpec) -> Tensor:
    """Return a policy loss of one token; `s` is the ratio of its sequence."""
    low, high = BOUNDS.get(loss.name, (0.0, math.inf))
    low, high = loss.params.get("clip_low", low), loss.params.get("clip_high", high)
    ratio = torch.exp(lp - q)
    match loss.name:
        case "importance_sampling":
            return -ratio * advantage
        case "ppo":
            return -torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
        case "cispo":
            return -torch.clamp(ratio, low, high).detach() * lp * advantage
        case "gspo":
            ratio = s * torch.exp(lp - lp.detach())
            return -torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
        case "dro":
            return -(lp * advantage - loss.params.get("beta", 0.05) / 2 * (lp - q) ** 2)
        case "stable_reinforce":
            penalty = ratio - 1 - (lp - q)
            if ratio > high:  # the straight line that touches the curve at `high`
                penalty = (high - 1 - math.log(high)) + (high - 1) * (lp - q - math.log(high))
            weight = min(ratio.item(), high)
            return -weight * lp * advantage + loss.params.get("kl_coeff", 0.1) * penalty
    raise AssertionError(loss.name)


def metrics_of(lps: Sequence[Tensor], data: Sequence[Datum], loss: LossSpec) -> dict[str, float]:
    """Return the metrics of a batch from the log-probabilities of its targets, counted token by token."""
    losses = [loss_of(lp, datum, loss).item() for lp, datum in zip(lps, data, strict=True)]
    rows = [row for lp, datum in zip(lps, data, strict=True) for row in _rows(lp, datum) if row["weight"]]
    means = {"nll": lambda row: -row["lp"]}
    sums = {"weights": lambda row: row["weight"]}
    result = {"loss:sum": sum(losses), "tokens:sum": float(len(rows))}
    if loss.name != "cross_entropy":
        sums = {"penalty": lambda row: _penalty(row, loss)} if loss.name in ("dro", "stable_reinforce") else {}
        means = {name: lambda row, name=name: row[name] for name in ("ratio", "kl", "entropy_estimate")}  # type: ignore[misc]
        result["ratio:max"] = max(row["ratio"] for row in rows)
    if loss.name == "gspo":
        means["sequence_ratio"] = lambda row: row["s"]
    if loss.name in BOUNDS:
        low, high = (loss.params.get(f"clip_{which}", BOUNDS[loss.name][which == "high"]) for which in ("low", "high"))
        ratio = "s" if loss.name == "gspo" else "ratio"
        means["clipped"] = lambda row: float(not low <= row[ratio] <= high)
    result |= {f"{name}:sum": sum(map(value, rows)) for name, value in sums.items()}
    return result | {f"{name}:mean": sum(map(value, rows)) / len(rows) for name, value in means.items()}


def _rows(lp: Tensor, datum: Datum) -> Iterator[dict[str, float]]:
    weights = datum.weights if datum.weights is not None else [1.0] * len(lp)
    qs = datum.logprobs if datum.logprobs is not None else [0.0] * len(lp)
    mask = datum.ratio_mask if datum.ratio_mask is not None else weights
    logs = [each - q for each, q, marked in zip(lp.tolist(), qs, mask, strict=True) if marked]
    s = math.exp(sum(logs) / len(logs)) if logs else 1.0
    for each, q, weight in zip(lp.tolist(), qs, weights, strict=True):
        yield {
            "weight": weight, "lp": each, "q": q, "s": s,
            "ratio": math.exp(each - q), "kl": q - each, "entropy_estimate": -each,
        }  # fmt: skip


def _penalty(row: dict[str, float], loss: LossSpec) -> float:
    """Return a token's loss at an advantage of zero, which is its penalty."""
    return token_loss(torch.tensor(row["lp"]), row["q"], 0.0, 1.0, loss).item()
