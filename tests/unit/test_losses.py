"""The losses are their formulas, with the gradients that follow from them, and refuse parameters that mean nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.contracts.training import LossName, LossSpec
from shared.errors import UserError
from shared.models.losses import Given, make_loss

LP = [-1.0, -2.0, -0.5, -3.0]
Q = [-1.2, -1.0, -2.5, -3.0]
A = [1.0, -2.0, 0.5, 3.0]
W = [1.0, 1.0, 1.0, 0.0]
RATIO = [math.exp(lp - q) for lp, q in zip(LP, Q, strict=True)]  # 1.22, 0.37, 7.39, 1


def given(weights: list[float] = W) -> Given:
    return Given(torch.tensor(weights), torch.tensor(Q), torch.tensor(A))


def evaluate(name: LossName, weights: list[float] = W, **params: float) -> tuple[list[float], list[float]]:
    """Return each token's loss and the gradient of their sum."""
    lp = torch.tensor(LP, requires_grad=True)
    losses = make_loss(LossSpec(name=name, params=params)).per_token(lp, given(weights))
    torch.autograd.backward(losses.sum())
    assert lp.grad is not None
    return losses.tolist(), lp.grad.tolist()


def test_cross_entropy_weighs_each_token_and_takes_negative_weights() -> None:
    losses, slopes = evaluate("cross_entropy", [1.0, 0.5, -2.0, 0.0])
    assert losses == pytest.approx([1.0, 1.0, -1.0, 0.0])
    assert slopes == pytest.approx([-1.0, -0.5, 2.0, 0.0])


def test_importance_sampling_has_ratio_times_advantage_as_loss_and_slope() -> None:
    losses, slopes = evaluate("importance_sampling")
    wanted = [-RATIO[0], 2 * RATIO[1], -0.5 * RATIO[2], 0.0]
    assert losses == pytest.approx(wanted)
    assert slopes == pytest.approx(wanted)


def test_ppo_stops_the_gradient_only_where_clipping_makes_the_loss_larger() -> None:
    losses, slopes = evaluate("ppo")
    # 1: r above 1.2, A > 0, clipped. 2: r below 0.8, A < 0, clipped. 3: clipped. 4: masked.
    assert losses == pytest.approx([-1.2, 2 * 0.8, -0.5 * 1.2, 0.0])
    assert slopes == [0.0, 0.0, 0.0, 0.0]
    losses, slopes = evaluate("ppo", clip_low=0.5, clip_high=10.0)
    assert losses == pytest.approx([-RATIO[0], 2 * 0.5, -0.5 * RATIO[2], 0.0])
    assert slopes == pytest.approx([-RATIO[0], 0.0, -0.5 * RATIO[2], 0.0])


def test_ppo_keeps_the_gradient_of_a_bad_token_that_became_likelier() -> None:
    lp = torch.tensor([0.0], requires_grad=True)
    worse = Given(torch.ones(1), torch.tensor([-1.0]), torch.tensor([-1.0]))
    loss = make_loss(LossSpec(name="ppo")).per_token(lp, worse).sum()
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(math.e)
    assert lp.grad is not None
    assert lp.grad.item() == pytest.approx(math.e)


def test_cispo_clips_the_weight_but_keeps_every_gradient() -> None:
    losses, slopes = evaluate("cispo")
    weights = [RATIO[0], RATIO[1], 4.0]
    assert losses == pytest.approx([-weights[0] * -1.0, 2 * weights[1] * -2.0, -0.5 * 4.0 * -0.5, 0.0])
    assert slopes == pytest.approx([-weights[0], 2 * weights[1], -0.5 * 4.0, 0.0])


def test_tinkers_longer_parameter_names_mean_the_same() -> None:
    longer = evaluate("ppo", clip_low_threshold=0.5, clip_high_threshold=10.0)
    assert longer == evaluate("ppo", clip_low=0.5, clip_high=10.0)


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "cispo"])
def test_a_token_that_cannot_move_has_no_gradient(name: LossName) -> None:
    loss = make_loss(LossSpec(name=name))
    still = Given(torch.tensor([1.0, 0.0]), torch.tensor(Q[:2]), torch.tensor([0.0, 1.0]))
    lp = torch.tensor(LP[:2], requires_grad=True)
    torch.autograd.backward(loss.per_token(lp, still).sum())
    assert lp.grad is not None
    moved: Tensor = lp.grad != 0
    assert not (moved & ~loss.moves(still)).any()
    assert loss.moves(still).tolist() == [name == "cross_entropy", False]


def test_metrics_name_their_reduction_and_leave_masked_tokens_out() -> None:
    metrics = make_loss(LossSpec(name="ppo")).metrics(torch.tensor(LP), given())
    assert metrics == pytest.approx(
        {
            "loss:sum": -1.2 + 1.6 - 0.6,
            "tokens:sum": 3.0,
            "ratio:mean": sum(RATIO[:3]) / 3,
            "kl:mean": (-0.2 + 1.0 - 2.0) / 3,
            "entropy_estimate:mean": 3.5 / 3,
            "clipped:mean": 1.0,
        }
    )
    assert make_loss(LossSpec(name="cross_entropy")).metrics(torch.tensor(LP), given()).keys() == {
        "loss:sum",
        "tokens:sum",
    }


def test_means_over_no_token_are_zero() -> None:
    metrics = make_loss(LossSpec(name="cispo")).metrics(torch.tensor(LP), given([0.0] * 4))
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("sft", {}, "'sft' is unknown"),
        ("cross_entropy", {"clip_low": 0.5}, "has no parameters"),
        ("ppo", {"clip": 0.5}, "no parameter 'clip'"),
        ("ppo", {"clip_low": float("nan")}, "finite"),
        ("ppo", {"clip_high": float("inf")}, "finite"),
        ("ppo", {"clip_low": 1.3}, "must be from 0 to clip_high 1.2"),
        ("cispo", {"clip_low": -0.1}, "must be from 0"),
        ("cispo", {"clip_low": 0.1, "clip_low_threshold": 0.1}, "given twice"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(name: Any, params: dict[str, float], text: str) -> None:
    with pytest.raises(UserError, match=text):
        make_loss(LossSpec(name=name, params=params))
