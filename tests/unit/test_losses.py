"""The losses are their formulas, with the gradients that follow from them, and refuse parameters that mean nothing."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.training import Datum, LossName, LossSpec
from shared.errors import UserError
from shared.loss_params import LOSS_PARAMS
from shared.models.losses import FUNCTIONS, Given, make_loss, sequence_log_ratio
from tests.engines.formulas import loss_of, metrics_of

LP = [-1.0, -2.0, -0.5, -3.0]
Q = [-1.2, -1.0, -2.5, -3.0]
A = [1.0, -2.0, 0.5, 3.0]
W = [1.0, 1.0, 1.0, 0.0]
RATIO = [math.exp(lp - q) for lp, q in zip(LP, Q, strict=True)]  # 1.22, 0.37, 7.39, 1


def made(weights: list[float], q: list[float], advantages: list[float], log_s: float = 0.0) -> Given:
    n = len(q)
    return Given(
        torch.tensor(weights), torch.tensor(q), torch.tensor(advantages), torch.ones(n), torch.full((n,), log_s)
    )


def given(weights: list[float] = W) -> Given:
    return made(weights, Q, A)


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
    worse = made([1.0], [-1.0], [-1.0])
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


def test_dro_is_pulled_to_where_the_log_ratio_is_advantage_over_beta() -> None:
    losses, slopes = evaluate("dro", beta=0.5)
    apart = [lp - q for lp, q in zip(LP, Q, strict=True)]
    assert losses == pytest.approx([-(-1.0 - 0.25 * 0.04), -(4.0 - 0.25), -(-0.25 - 0.25 * 4), 0.0])
    assert slopes == pytest.approx([-a + 0.5 * each for a, each in zip(A[:3], apart, strict=False)] + [0.0])


def test_gspo_gives_each_token_the_ratio_of_the_sequence_and_its_own_gradient() -> None:
    s = math.exp(0.1)
    lp = torch.tensor(LP, requires_grad=True)
    losses = make_loss(LossSpec(name="gspo")).per_token(lp, made(W, Q, A, 0.1))
    torch.autograd.backward(losses.sum())
    assert lp.grad is not None
    assert losses.tolist() == pytest.approx([-s, 2 * s, -0.5 * s, 0.0])
    assert lp.grad.tolist() == pytest.approx([-s, 2 * s, -0.5 * s, 0.0])


def test_gspo_clips_whole_sequences() -> None:
    lp = torch.tensor(LP, requires_grad=True)
    losses = make_loss(LossSpec(name="gspo")).per_token(lp, made(W, Q, A, 1.0))
    torch.autograd.backward(losses.sum())
    assert lp.grad is not None
    assert losses.tolist() == pytest.approx([-1.2, 2 * math.e, -0.5 * 1.2, 0.0])
    assert lp.grad.tolist() == pytest.approx([0.0, 2 * math.e, 0.0, 0.0])  # as in ppo, worse than before is not clipped


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_the_marked_ones() -> None:
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    log_s = sequence_log_ratio(torch.tensor(LP), torch.tensor(Q), mask)
    assert math.exp(float(log_s)) == pytest.approx(math.sqrt(RATIO[0] * RATIO[2]))
    assert float(sequence_log_ratio(torch.tensor(LP), torch.tensor(Q), torch.zeros(4))) == 0


def test_stable_reinforce_truncates_ratios_and_pulls_back_to_the_sampling_policy() -> None:
    _, slopes = evaluate("stable_reinforce", kl_coeff=0.5, clip_high=2.0)
    weights = [min(ratio, 2.0) for ratio in RATIO]
    wanted = [-w * a + 0.5 * (w - 1) for w, a in zip(weights, A, strict=True)]
    assert slopes == pytest.approx([*wanted[:3], 0.0])
    _, without = evaluate("stable_reinforce", kl_coeff=0.0)
    assert without == pytest.approx([-weights[0], 2 * weights[1], -0.5 * weights[2], 0.0])


def test_the_gradient_of_the_penalty_is_that_of_the_divergence_from_the_sampling_policy() -> None:
    """In expectation over samples from q, worked out over all tokens of a small vocabulary."""
    torch.manual_seed(0)
    q = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    logits = (q + 0.2 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    lp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((q.exp() * (q - lp)).sum(), logits, retain_graph=True)
    nothing = torch.zeros(6, dtype=torch.float64)
    one = Given(nothing + 1, q, nothing, nothing, nothing)
    loss = make_loss(LossSpec(name="stable_reinforce", params={"kl_coeff": 1.0, "clip_high": 10.0}))
    sampled = (q.exp() * loss.per_token(lp, one)).sum()
    (ours,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    assert ours.tolist() == pytest.approx(exact.tolist(), abs=1e-12)
    assert sampled.item() == pytest.approx((q.exp() * (q - lp)).sum().item())


def test_stable_reinforce_stays_finite_where_ratios_overflow() -> None:
    far = made([1.0, 1.0], [-200.0, 0.0], [1.0, 1.0])
    lp = torch.tensor([-1.0, -200.0], requires_grad=True)
    loss = make_loss(LossSpec(name="stable_reinforce", params={"kl_coeff": 0.5}))
    torch.autograd.backward(loss.per_token(lp, far).sum())
    assert lp.grad is not None
    assert lp.grad.tolist() == pytest.approx([-2.0 + 0.5, 0.0 - 0.5])
    assert all(math.isfinite(value) for value in loss.metrics(lp.detach(), far).values())


@pytest.mark.parametrize("name", get_args(LossName))
@pytest.mark.parametrize("seed", range(3))
def test_every_loss_and_its_gradient_are_those_of_the_formula_written_out(name: LossName, seed: int) -> None:
    torch.manual_seed(seed)
    q, lp, advantages = -3 + torch.randn(3, 20)
    weights = (torch.rand(20) < 0.7).float() * (torch.randn(20) if name == "cross_entropy" else 1)
    spec, mask = LossSpec(name=name), (torch.rand(20) < 0.5).float()
    datum = Datum(
        tokens=Int32s([1] * 20), targets=Int32s([1] * 20), weights=Float32s(weights.tolist()),
        logprobs=Float32s(q.tolist()), advantages=Float32s(advantages.tolist()), ratio_mask=Float32s(mask.tolist()),
    )  # fmt: skip
    plain = lp.double().requires_grad_()
    torch.autograd.backward(loss_of(plain, datum, spec))
    log_s = float(sequence_log_ratio(lp, q, mask))
    ours = lp.clone().requires_grad_()
    columns = made(weights.tolist(), q.tolist(), advantages.tolist(), log_s)
    losses = make_loss(spec).per_token(ours, columns)
    torch.autograd.backward(losses.sum())
    assert plain.grad is not None
    assert ours.grad is not None
    assert losses.sum().item() == pytest.approx(loss_of(lp.double(), datum, spec).item(), rel=1e-5)
    assert ours.grad.tolist() == pytest.approx(plain.grad.tolist(), rel=1e-4, abs=1e-6)
    assert make_loss(spec).metrics(lp, columns) == pytest.approx(metrics_of([lp], [datum], spec), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", get_args(LossName))
def test_a_token_that_cannot_move_has_no_gradient(name: LossName) -> None:
    loss = make_loss(LossSpec(name=name))
    still = made([1.0, 0.0], Q[:2], [0.0, 1.0])
    lp = torch.tensor(LP[:2], requires_grad=True)
    torch.autograd.backward(loss.per_token(lp, still).sum())
    assert lp.grad is not None
    moved: Tensor = lp.grad != 0
    assert not (moved & ~loss.moves(still)).any()
    assert loss.moves(still).tolist() == [name in ("cross_entropy", "dro", "stable_reinforce"), False]


def test_without_its_penalty_a_loss_leaves_tokens_of_no_advantage_alone() -> None:
    loss = make_loss(LossSpec(name="stable_reinforce", params={"kl_coeff": 0.0}))
    assert loss.moves(made([1.0, 1.0], Q[:2], [0.0, 1.0])).tolist() == [False, True]


def test_metrics_name_their_reduction_and_leave_masked_tokens_out() -> None:
    metrics = make_loss(LossSpec(name="ppo")).metrics(torch.tensor(LP), given())
    assert metrics == pytest.approx(
        {
            "loss:sum": -1.2 + 1.6 - 0.6,
            "tokens:sum": 3.0,
            "ratio:mean": sum(RATIO[:3]) / 3,
            "ratio:max": RATIO[2],
            "kl:mean": (-0.2 + 1.0 - 2.0) / 3,
            "entropy_estimate:mean": 3.5 / 3,
            "clipped:mean": 1.0,
        }
    )
    metrics = make_loss(LossSpec(name="cross_entropy")).metrics(torch.tensor(LP), given([2.0, -0.5, 0.0, 0.0]))
    assert metrics == pytest.approx({"loss:sum": 1.0, "tokens:sum": 2.0, "weights:sum": 1.5, "nll:mean": 1.5})


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
        ("gspo", {"clip_high": 0.5}, "clip_low 0.8 must be from 0 to clip_high 0.5"),
        ("dro", {"beta": -0.1}, "beta is -0.1, it must be 0 or more"),
        ("dro", {"clip_high": 1.0}, "no parameter 'clip_high': it takes beta"),
        ("stable_reinforce", {"kl_coeff": -1.0}, "kl_coeff is -1"),
        ("stable_reinforce", {"clip_high": 0.9}, "clip_high is 0.9, it must be 1 or more"),
        ("stable_reinforce", {"beta": 1.0}, "it takes clip_high and kl_coeff"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(name: Any, params: dict[str, float], text: str) -> None:
    with pytest.raises(UserError, match=text):
        make_loss(LossSpec(name=name, params=params))


def test_every_loss_has_a_function_and_parameters() -> None:
    assert list(get_args(LossName)) == list(FUNCTIONS) == list(LOSS_PARAMS)
