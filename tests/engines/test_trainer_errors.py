"""A bad request, a diverged run or too little memory harms only the run that it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.trainer.engines import body, passes, run_state
from services.trainer.engines.base import PassItem
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossName, LossSpec
from shared.errors import PermanentError, UserError
from shared.models.logprobs import target_logprobs
from shared.models.packing import Packed
from tests.engines.reference import some_data
from tests.engines.tiny import CONTEXT, VOCABULARY
from tests.engines.training import (
    RUNS,
    changed,
    close,
    data_of,
    expect,
    good,
    gradient,
    longest,
    replaced,
    seeing,
    trained,
)

NAN = float("nan")


def marked(datum: Datum, *first: float) -> Datum:
    """Return the datum with a ratio_mask that begins like this and goes on with zeros."""
    return replaced(datum, ratio_mask=Float32s([*first, *[0.0] * (len(datum.tokens) - len(first))]))


# What to change in the second of three data, and what the error must say.
BAD: dict[str, tuple[LossSpec, Callable[[Datum], Datum], str]] = {
    "token outside": (LossSpec(name="ppo"), lambda d: changed(d, "tokens", 2, VOCABULARY), "tokens[2] is 264"),
    "negative token": (LossSpec(name="ppo"), lambda d: changed(d, "tokens", 0, -1), "tokens[0] is -1"),
    "target outside": (LossSpec(name="ppo"), lambda d: changed(d, "targets", 1, 9999), "targets[1] is 9999"),
    "few targets": (LossSpec(name="ppo"), lambda d: replaced(d, targets=d.targets[:-1]), "targets for"),
    "few weights": (LossSpec(name="ppo"), lambda d: replaced(d, weights=Float32s([1.0])), "has 1 weights"),
    "few logprobs": (LossSpec(name="ppo"), lambda d: replaced(d, logprobs=Float32s([1.0])), "has 1 logprobs"),
    "few advantages": (LossSpec(name="ppo"), lambda d: replaced(d, advantages=Float32s()), "has 0 advantages"),
    "no logprobs": (LossSpec(name="cispo"), lambda d: replaced(d, logprobs=None), "no logprobs, which cispo needs"),
    "no advantages": (LossSpec(name="ppo"), lambda d: replaced(d, advantages=None), "no advantages"),
    "no tokens": (LossSpec(name="ppo"), lambda _: Datum(tokens=Int32s(), targets=Int32s()), "no tokens"),
    "too long": (LossSpec(name="cross_entropy"), lambda _: longest(CONTEXT + 1), "context holds 1024"),
    "NaN logprob": (LossSpec(name="ppo"), lambda d: changed(d, "logprobs", -1, NAN), "is nan"),
    "infinite advantage": (LossSpec(name="ppo"), lambda d: changed(d, "advantages", -1, NAN), "must be a finite"),
    "NaN weight": (LossSpec(name="cross_entropy"), lambda d: changed(d, "weights", 0, NAN), "weights[0] is nan"),
    "infinite weight": (LossSpec(name="cross_entropy"), lambda d: changed(d, "weights", 0, -math.inf), "is -inf"),
    "no width": (LossSpec(name="cross_entropy"), lambda d: replaced(d, targets_per_token=0), "must be from 1 to 264"),
    "too wide": (LossSpec(name="cross_entropy"), lambda d: replaced(d, targets_per_token=265), "must be from 1 to 264"),
    "few targets of several": (
        LossSpec(name="cross_entropy"),
        lambda d: replaced(d, targets_per_token=2),
        "give 2, its targets_per_token, for each token",
    ),
    "few weights of several": (
        LossSpec(name="cross_entropy"),
        lambda d: replaced(d, targets_per_token=2, targets=Int32s([*d.targets, *d.targets])),
        "weights for",
    ),
    "wide target outside": (
        LossSpec(name="cross_entropy"),
        lambda d: replaced(d, targets_per_token=2, targets=Int32s([*d.targets, *d.targets[1:], 9999]), weights=None),
        "] is 9999",
    ),
    "several for a policy": (LossSpec(name="dro"), lambda d: replaced(d, targets_per_token=2), "dro takes one target"),
    "short ratio_mask": (LossSpec(name="gspo"), lambda d: replaced(d, ratio_mask=Float32s([1.0])), "has 1 ratio_mask"),
    "NaN in ratio_mask": (LossSpec(name="gspo"), lambda d: marked(d, NAN), "ratio_mask[0] is nan, it must be 0 or 1"),
    "half in ratio_mask": (LossSpec(name="gspo"), lambda d: marked(d, 0.5), "ratio_mask[0] is 0.5"),
    "empty ratio_mask": (LossSpec(name="gspo"), marked, "has a ratio_mask of zeros"),
    "marked without logprob": (
        LossSpec(name="gspo"),
        lambda d: changed(marked(d, 1.0), "logprobs", 0, NAN),
        "logprobs[0] is nan",
    ),
    "mask of 2": (LossSpec(name="ppo"), lambda d: changed(d, "weights", 0, 2.0), "weights[0] is 2, for ppo"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refused_item_names_datum_and_rule_and_harms_nobody(engine: TorchTrainerEngine, case: str) -> None:
    loss, spoil, text = BAD[case]
    data = some_data(11, loss.name, count=3)
    others = [PassItem(run, some_data(12, RUNS[run][1].name), RUNS[run][1]) for run in ("b", "d")]
    for run in ("bad", "b", "d"):
        trained(engine, run)
    engine.forward_backward([PassItem("bad", data, loss)])
    before = gradient(engine, "bad").clone()
    expected = expect(engine, others)
    outcomes = engine.forward_backward(
        [others[0], PassItem("bad", [data[0], spoil(data[1]), data[2]], loss), others[1]]
    )
    error = outcomes[1].error
    assert isinstance(error, UserError)
    assert "datum 1" in str(error)
    assert text in str(error)
    assert torch.equal(gradient(engine, "bad"), before)
    for item in others:
        assert torch.equal(gradient(engine, item.run), expected[item.run])


def test_masked_tokens_need_no_logprobs(engine: TorchTrainerEngine) -> None:
    trained(engine, "run")
    (datum,) = some_data(11, "ppo", count=1)
    assert datum.weights is not None
    assert datum.weights[0] == 0
    missing = changed(changed(datum, "logprobs", 0, NAN), "advantages", 0, NAN)
    (full,) = engine.forward_backward([PassItem("run", [datum], LossSpec(name="ppo"))])
    (partial,) = engine.forward_backward([PassItem("run", [missing], LossSpec(name="ppo"))])
    assert good(full).metrics == good(partial).metrics


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"betta": 1.0}, "no parameter 'betta'"),
        ({"beta": NAN}, "must be a finite number"),
        ({"beta": -1.0}, "0 or more"),
    ],
)
def test_parameters_that_mean_nothing_harm_nobody(
    engine: TorchTrainerEngine, params: dict[str, float], text: str
) -> None:
    for run in ("bad", "e", "f"):
        trained(engine, run)
    others = [PassItem(run, data_of(run, 12), RUNS[run][1]) for run in ("e", "f")]
    expected = expect(engine, others)
    bad = PassItem("bad", data_of("e", 13), LossSpec(name="dro", params=params))
    outcomes = engine.forward_backward([others[0], bad, others[1]])
    assert isinstance(outcomes[1].error, UserError)
    assert text in str(outcomes[1].error)
    assert engine._states["bad"].gradient is None
    for item in others:
        assert torch.equal(gradient(engine, item.run), expected[item.run])


@pytest.mark.parametrize("like", RUNS)
def test_a_diverged_run_fails_alone_and_keeps_its_gradient(engine: TorchTrainerEngine, like: str) -> None:
    """Whatever its loss, and among whatever others."""
    others = [run for run in ("b", "f", "g", "h") if run != like]
    items = [PassItem(run, data_of(run, 20), RUNS[run][1]) for run in others]
    for run in (*others, like):
        trained(engine, run)
    expected = expect(engine, items)
    poisoned = PassItem(like, data_of(like, 21), RUNS[like][1])
    good(*engine.forward_backward([poisoned]))
    before = gradient(engine, like).clone()
    engine._states[like].weights.mul_(1e25)
    outcomes = engine.forward_backward([items[0], poisoned, *items[1:]])
    assert isinstance(outcomes[1].error, PermanentError)
    assert not isinstance(outcomes[1].error, UserError)
    assert torch.equal(gradient(engine, like), before)
    for item in items:
        assert close(gradient(engine, item.run), expected[item.run], 1e-6)


def test_a_ratio_that_overflows_fails_a_loss_that_does_not_bound_it_and_no_other(engine: TorchTrainerEngine) -> None:
    names: tuple[LossName, ...] = ("importance_sampling", "stable_reinforce", "cispo")
    items = []
    for name in names:
        trained(engine, name)
        data = some_data(5, name)
        unlikely = [replaced(d, logprobs=Float32s([-200.0] * len(d.tokens))) for d in data]
        items.append(PassItem(name, unlikely, LossSpec(name=name)))
    first, *bounded = engine.forward_backward(items)
    assert "the loss is" in str(first.error)
    for outcome in bounded:
        assert all(math.isfinite(value) for value in good(outcome).metrics.values())


def test_a_diverged_run_that_is_only_evaluated_fails_too(engine: TorchTrainerEngine) -> None:
    trained(engine, "run")
    engine._states["run"].weights.mul_(1e25)
    loss = LossSpec(name="cross_entropy")
    (outcome,) = engine.forward_backward([PassItem("run", some_data(21, loss.name), loss, forward_only=True)])
    assert "the loss is nan" in str(outcome.error)


def test_a_gradient_that_overflows_under_a_finite_loss_is_left_out(engine: TorchTrainerEngine) -> None:
    engine.create_run("run", LoraSpec(alpha=1e6))
    (datum,) = some_data(21, "importance_sampling", count=1)
    count = len(datum.tokens)
    huge = replaced(datum, logprobs=Float32s([-4.0] * count), advantages=Float32s([1e37] * count))
    item = PassItem("run", [huge], LossSpec(name="importance_sampling"))
    good(*engine.forward_backward([PassItem("run", [huge], item.loss, forward_only=True)]))
    (outcome,) = engine.forward_backward([item])
    assert "the gradient is infinite or NaN" in str(outcome.error)
    assert engine._states["run"].gradient is None


def test_unknown_empty_and_repeated_items_are_refused(engine: TorchTrainerEngine) -> None:
    trained(engine, "run")
    data, loss = some_data(1, "ppo"), LossSpec(name="ppo")
    items = [PassItem("ghost", data, loss), PassItem("run", [], loss), PassItem("run", data, loss)]
    ghost, empty, once = engine.forward_backward(items)
    assert "'ghost' is not on this trainer" in str(ghost.error)
    assert "empty" in str(empty.error)
    good(once)
    again = engine.forward_backward([items[2], items[2]])
    assert again[0].error is None
    assert "twice" in str(again[1].error)
    assert "'ghost'" in str(engine.optim_step({"ghost": AdamParams()})["ghost"].error)


@pytest.mark.parametrize(
    ("adam", "text"),
    [
        (AdamParams(learning_rate=float("inf")), "learning_rate is inf"),
        (AdamParams(weight_decay=NAN), "weight_decay is nan"),
        (AdamParams(learning_rate=1e6, weight_decay=1e6), "would make weights"),
    ],
)
def test_a_step_that_cannot_be_applied_changes_nothing(engine: TorchTrainerEngine, adam: AdamParams, text: str) -> None:
    trained(engine, "run")
    engine.forward_backward([PassItem("run", some_data(1, "ppo"), LossSpec(name="ppo"))])
    engine._states["run"].weights.mul_(1e30)
    before = engine.snapshot("run")
    assert text in str(engine.optim_step({"run": adam})["run"].error)
    assert engine.snapshot("run") == before


def test_a_snapshot_that_does_not_fit_is_refused(engine: TorchTrainerEngine, model: Path) -> None:
    trained(engine, "run")
    state = engine.snapshot("run")
    engine._states["run"].weights[3] = NAN
    not_finite = engine.snapshot("run")
    cases = [
        (engine, state[: len(state) // 2], "no intact safetensors"),
        (engine, b"", "no intact safetensors"),
        (engine, not_finite, "not finite"),
        (TorchTrainerEngine("other", model), state, "base model 'tiny'"),
        (engine, state.replace(b"layers.1.mlp.up_proj", b"layers.7.mlp.up_proj"), "other names or shapes"),
        (engine, engine.export_adapter("run")["adapter_model.safetensors"], "has format"),
    ]
    for there, data, text in cases:
        with pytest.raises(PermanentError, match=text):
            there.restore("new", data)
        assert "new" not in there.runs


def test_memory_that_runs_out_splits_the_pass_down_to_single_sequences(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = some_data(3, "ppo", count=12, group=4, longest=12)
    engine, roomy = TorchTrainerEngine("tiny", model), TorchTrainerEngine("tiny", model)
    for each in (engine, roomy):
        trained(each, "run")
        trained(each, "long")
    good(*roomy.forward_backward([PassItem("run", data, LossSpec(name="ppo"))]))
    most = max(len(datum.tokens) for datum in data)
    seen: list[int] = []

    def cramped(packed: Packed) -> None:
        seen.append(len(packed.tokens))
        if len(packed.tokens) > most:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(body, "hidden_states", seeing(cramped))
    items = [PassItem("run", data, LossSpec(name="ppo"))]
    items.append(PassItem("long", [longest(most + 1)], LossSpec(name="cross_entropy")))
    fits, does_not = engine.forward_backward(items)
    good(fits)
    assert close(gradient(engine, "run"), gradient(roomy, "run"))
    assert max(seen) > most
    assert "does not fit into the trainer's memory" in str(does_not.error)
    assert engine._states["long"].gradient is None
    seen.clear()
    good(*engine.forward_backward(items[:1]))
    assert max(seen) <= most, "what did not fit is not tried again"
    engine.drop_run("long")
    good(*engine.forward_backward(items[:1]))
    assert max(seen) > most, "until there is more room"


@pytest.mark.parametrize("run", ["d", "f"])
def test_memory_that_runs_out_halfway_leaves_nothing_behind(
    model: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    engine, roomy = (TorchTrainerEngine("tiny", model, max_logits=20 * VOCABULARY) for _ in range(2))
    item = PassItem(run, data_of(run, 3, count=6), RUNS[run][1])
    for each in (engine, roomy):
        trained(each, run)
    good(*roomy.forward_backward([item]))
    chunks: list[int] = []

    def cramped(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        chunks.extend([len(rows)] * logits.requires_grad)
        if logits.requires_grad and len(chunks) == 3:  # the unembedding's own gradient of two chunks is there by now
            raise torch.OutOfMemoryError("no room")
        return target_logprobs(logits, rows, targets)

    monkeypatch.setattr(passes, "target_logprobs", cramped)
    good(*engine.forward_backward([item]))
    assert len(chunks) > 4
    assert close(gradient(engine, run), gradient(roomy, run))


def test_memory_that_runs_out_in_a_step_changes_nothing(
    engine: TorchTrainerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cramped(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    trained(engine, "run")
    engine.forward_backward([PassItem("run", some_data(1, "ppo"), LossSpec(name="ppo"))])
    before = engine.snapshot("run")
    monkeypatch.setattr(run_state, "adamw", cramped)
    assert "no memory is left on cpu" in str(engine.optim_step({"run": AdamParams()})["run"].error)
    assert engine.snapshot("run") == before
