"""The torch trainer engine computes what each run alone would compute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.engines import body, passes
from services.trainer.engines.base import PassItem
from services.trainer.engines.fused.layers import FusedOptions
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Float32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, LossSpec
from shared.errors import UserError
from shared.models.logprobs import target_logprobs
from tests.engines.formulas import metrics_of
from tests.engines.reference import Alone, distance, exported, some_data
from tests.engines.tiny import FAMILIES, VOCABULARY, make_tiny_model
from tests.engines.training import (
    CLOSE,
    LOSSES,
    RUNS,
    alone,
    changing,
    close,
    data_of,
    expect,
    good,
    gradient,
    joined,
    named_gradient,
    replaced,
    seeing,
    trained,
    watch_rows,
)

STEPS = 5


MIXTURES = ["abcd", "efgh", "cfeh", "bdeg"]


@pytest.mark.parametrize(
    ("runs", "fused"), [*((runs, None) for runs in (*RUNS, *MIXTURES)), *((runs, FusedOptions()) for runs in MIXTURES)]
)
def test_runs_in_one_pass_train_as_each_alone_with_peft_and_torch_adamw(
    model: Path, tmp_path: Path, runs: str, fused: FusedOptions | None
) -> None:
    engine = TorchTrainerEngine("tiny", model, max_logits=40 * VOCABULARY, fused=fused)
    references: dict[str, Alone] = {}
    for run in runs:
        engine.create_run(run, RUNS[run][0])
        references[run] = alone(engine, run, model, tmp_path)
    for step in range(STEPS):
        data = {run: data_of(run, 100 * step + ord(run), group=2) for run in runs}
        outcomes = engine.forward_backward([PassItem(run, data[run], RUNS[run][1]) for run in runs])
        for run, outcome in zip(runs, outcomes, strict=True):
            logprobs = references[run].forward_backward(data[run], RUNS[run][1])
            expected = metrics_of(logprobs, data[run], RUNS[run][1])
            assert good(outcome).metrics == pytest.approx(expected, rel=CLOSE, abs=1e-4)
            assert torch.cat(logprobs).tolist() == pytest.approx([x for lp in outcome.logprobs for x in lp], rel=CLOSE)
            assert distance(named_gradient(engine, run), references[run].named(gradients=True)) < CLOSE
        adams = {run: changing(RUNS[run][2], step) for run in runs}
        steps = engine.optim_step(adams)
        for run in runs:
            norm = references[run].step(adams[run])
            assert steps[run].metrics["grad_norm:mean"] == pytest.approx(norm, rel=CLOSE)
            assert steps[run].metrics["step:max"] == step + 1
    for run in runs:
        assert distance(exported(engine.export_adapter(run)), references[run].named()) < CLOSE


def test_mixtures_differ_in_rank_loss_and_learning_rate() -> None:
    for runs in MIXTURES:
        assert {RUNS[run][0].rank for run in runs} == {4, 8, 16, 32}
        assert len({RUNS[run][1].name for run in runs}) == 4
        assert len({RUNS[run][2].learning_rate for run in runs}) == 4
    assert {RUNS[run][1].name for runs in MIXTURES for run in runs} == set(LOSSES)


@pytest.mark.parametrize("run", RUNS)
def test_two_half_batches_give_the_gradient_and_the_metrics_of_the_whole(model: Path, run: str) -> None:
    data, spec = data_of(run, 7, count=6), RUNS[run][1]
    whole, halves = TorchTrainerEngine("tiny", model), TorchTrainerEngine("tiny", model)
    trained(whole, run)
    trained(halves, run)
    one = good(*whole.forward_backward([PassItem(run, data, spec)]))
    parts = [good(*halves.forward_backward([PassItem(run, half, spec)])) for half in (data[:2], data[2:])]
    assert joined([part.metrics for part in parts]) == pytest.approx(one.metrics, rel=CLOSE, abs=1e-5)
    assert [list(lp) for part in parts for lp in part.logprobs] == [
        pytest.approx(list(lp), abs=CLOSE) for lp in one.logprobs
    ]
    assert close(gradient(halves, run), gradient(whole, run))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_pass_tokens": 1},
        {"share_prefixes": False},
        {"max_logits": 5 * VOCABULARY},
        {"max_pass_tokens": 40},
        {"fused": FusedOptions()},
    ],
    ids="-".join,
)
def test_results_do_not_depend_on_packing_sharing_or_chunks(model: Path, run: str, settings: dict[str, Any]) -> None:
    data = data_of(run, 3, count=12, group=4)
    shared, other = TorchTrainerEngine("tiny", model), TorchTrainerEngine("tiny", model, **settings)
    outcomes = []
    for engine in (shared, other):
        trained(engine, run)
        outcomes.append(good(*engine.forward_backward([PassItem(run, data, RUNS[run][1])])))
    assert close(gradient(shared, run), gradient(other, run))
    assert outcomes[0].metrics == pytest.approx(outcomes[1].metrics, rel=1e-4, abs=1e-5)
    for ours, theirs in zip(outcomes[0].logprobs, outcomes[1].logprobs, strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist(), abs=CLOSE)


def test_negative_weights_turn_the_gradient_round(engine: TorchTrainerEngine) -> None:
    trained(engine, "h")
    data = data_of("h", 5)
    assert all(datum.weights is not None and min(datum.weights) < 0 < max(datum.weights) for datum in data)
    turned = [replaced(d, weights=Float32s(-weight for weight in d.weights or ())) for d in data]
    item = PassItem("h", data, RUNS["h"][1])
    plus = expect(engine, [item])["h"]
    minus = expect(engine, [PassItem("h", turned, RUNS["h"][1])])["h"]
    assert close(minus, -plus)


def test_several_targets_weigh_as_the_same_sequence_given_several_times(engine: TorchTrainerEngine) -> None:
    trained(engine, "h")
    wide = data_of("h", 6, count=3)
    narrow = [
        replaced(
            d, targets=d.targets[k::3], weights=d.weights[k::3] if d.weights is not None else None, targets_per_token=1
        )
        for d in wide
        for k in range(3)
    ]
    loss = RUNS["h"][1]
    (one,) = engine.forward_backward([PassItem("h", wide, loss, forward_only=True)])
    (other,) = engine.forward_backward([PassItem("h", narrow, loss, forward_only=True)])
    assert one.metrics == pytest.approx(other.metrics, rel=CLOSE)
    for index, logprobs in enumerate(one.logprobs):
        columns = [list(other.logprobs[3 * index + k]) for k in range(3)]
        assert list(logprobs) == pytest.approx([x for row in zip(*columns, strict=True) for x in row], abs=CLOSE)
    assert close(expect(engine, [PassItem("h", wide, loss)])["h"], expect(engine, [PassItem("h", narrow, loss)])["h"])


def test_only_losses_of_whole_sequences_compute_the_unembedding_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchTrainerEngine("tiny", model)
    predicted: list[tuple[bool, int]] = []

    def watched(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        predicted.append((logits.requires_grad, len(targets)))
        return target_logprobs(logits, rows, targets)

    monkeypatch.setattr(passes, "target_logprobs", watched)
    for run in ("c", "f"):
        trained(engine, run)
    predicted.clear()
    data = {run: data_of(run, 3) for run in ("c", "f")}
    moving = {run: sum(sum(datum.weights or ()) for datum in data[run]) for run in data}
    for outcome in engine.forward_backward([PassItem(run, data[run], RUNS[run][1]) for run in data]):
        good(outcome)
    still = sum(len(datum.tokens) for run in data for datum in data[run]) - sum(moving.values())
    assert predicted == [(False, still), (False, moving["f"]), (True, sum(moving.values()))]


def test_a_group_computes_its_prompt_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = watch_rows(monkeypatch)
    engine = TorchTrainerEngine("tiny", model)
    trained(engine, "run")
    rows.clear()
    data = some_data(3, "ppo", count=16, group=8, shortest=40, longest=50, completion=4)
    prompts = [len(datum.tokens) - 3 for datum in (data[0], data[8])]
    good(*engine.forward_backward([PassItem("run", data, LossSpec(name="ppo"))]))
    assert sum(rows) == sum(len(datum.tokens) for datum in data) - 7 * sum(prompts)


def test_tokens_without_a_gradient_take_no_backward_pass(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchTrainerEngine("tiny", model)
    trained(engine, "run")
    data = some_data(3, "ppo", count=4)
    still = [replaced(datum, advantages=Float32s([0.0] * len(datum.tokens))) for datum in data[:2]]
    graded: list[bool] = []
    monkeypatch.setattr(body, "hidden_states", seeing(lambda _: graded.append(torch.is_grad_enabled())))
    outcome = good(*engine.forward_backward([PassItem("run", [*still, *data[2:]], LossSpec(name="ppo"))]))
    assert graded == [True, False]
    assert all(value < 0 for logprobs in outcome.logprobs for value in logprobs)


def test_forward_only_gives_the_same_numbers_and_no_gradient(engine: TorchTrainerEngine) -> None:
    trained(engine, "run")
    item = PassItem("run", some_data(5, "ppo"), LossSpec(name="ppo"))
    only = good(*engine.forward_backward([PassItem(item.run, item.data, item.loss, forward_only=True)]))
    assert engine._states["run"].gradient is None
    both = good(*engine.forward_backward([item]))
    assert only.metrics == pytest.approx(both.metrics, rel=1e-6)
    assert [x.tolist() for x in only.logprobs] == [x.tolist() for x in both.logprobs]


def test_zero_advantages_count_as_a_gradient_of_zero(engine: TorchTrainerEngine) -> None:
    trained(engine, "run")
    data = [replaced(d, advantages=Float32s([0.0] * len(d.tokens))) for d in some_data(5, "ppo")]
    good(*engine.forward_backward([PassItem("run", data, LossSpec(name="ppo"))]))
    assert not gradient(engine, "run").any()
    assert engine.optim_step({"run": AdamParams()})["run"].metrics["update_norm:mean"] > 0  # momentum goes on


def test_a_step_of_one_run_leaves_the_others_bit_for_bit(engine: TorchTrainerEngine) -> None:
    for run in ("a", "b"):
        trained(engine, run)
        engine.forward_backward([PassItem(run, some_data(1, RUNS[run][1].name), RUNS[run][1])])
    before = engine.snapshot("b")
    engine.optim_step({"a": AdamParams(learning_rate=0.1, weight_decay=0.9, grad_clip_norm=1e-3)})
    engine.forward_backward([PassItem("a", some_data(1, "cross_entropy"), RUNS["a"][1])])
    assert engine.snapshot("b") == before


@pytest.mark.parametrize("run", RUNS)
def test_every_metric_says_how_parts_are_joined(engine: TorchTrainerEngine, run: str) -> None:
    lora, loss, adam = RUNS[run]
    engine.create_run(run, lora)
    data = data_of(run, 3)
    for forward_only in (True, False):
        outcome = good(*engine.forward_backward([PassItem(run, data, loss, forward_only)]))
        assert "loss:sum" in outcome.metrics
        for name in outcome.metrics:
            assert re.fullmatch(r"[a-z_]+:(mean|sum|min|max)", name), name
        for datum, logprobs in zip(data, outcome.logprobs, strict=True):
            assert len(logprobs) == len(datum.targets)
    for name in engine.optim_step({run: adam})[run].metrics:
        assert re.fullmatch(r"[a-z_]+:(mean|sum|min|max)", name), name


def test_a_step_without_gradient_only_counts(engine: TorchTrainerEngine) -> None:
    trained(engine, "run")
    weights = engine.export_adapter("run")
    outcome = engine.optim_step({"run": AdamParams(weight_decay=0.5)})["run"]
    assert outcome.metrics == {"grad_norm:mean": 0.0, "update_norm:mean": 0.0, "step:max": 2.0}
    assert engine.export_adapter("run") == weights


def test_a_snapshot_continues_bit_for_bit_in_another_process(engine: TorchTrainerEngine, model: Path) -> None:
    engine.create_run("d", RUNS["d"][0])
    for step in range(3):
        engine.forward_backward([PassItem("d", some_data(step, "cispo"), RUNS["d"][1])])
        engine.optim_step({"d": RUNS["d"][2]})
    engine.forward_backward([PassItem("d", some_data(9, "cispo"), RUNS["d"][1])])  # gathered, not yet applied
    other = TorchTrainerEngine("tiny", model)
    other.restore("d", engine.snapshot("d"))
    for each in (engine, other):
        each.forward_backward([PassItem("d", some_data(10, "cispo"), RUNS["d"][1])])
        each.optim_step({"d": RUNS["d"][2]})
    assert other.snapshot("d") == engine.snapshot("d")
    assert other.export_adapter("d") == engine.export_adapter("d")


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_adapter_gives_the_same_logprobs_in_peft(tmp_path: Path, tied: bool) -> None:
    directory = make_tiny_model(tmp_path / "model", tied=tied)
    engine = TorchTrainerEngine("tiny", directory)
    embedding = engine._model.get_input_embeddings().weight.clone()
    trained(engine, "d")
    data = some_data(4, "cross_entropy")
    outcome = good(*engine.forward_backward([PassItem("d", data, LossSpec(name="cross_entropy"), forward_only=True)]))
    plain = alone(engine, "d", directory, tmp_path)
    for datum, logprobs in zip(data, outcome.logprobs, strict=True):
        assert plain.logprobs(datum).tolist() == pytest.approx(logprobs.tolist(), abs=CLOSE)
    assert torch.equal(engine._model.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_logprobs_and_gradients_of_plain_transformers(tmp_path: Path, family: str) -> None:
    directory = make_tiny_model(tmp_path / "model", family=family)
    engine = TorchTrainerEngine("tiny", directory)
    trained(engine, "d")
    reference = alone(engine, "d", directory, tmp_path)
    data, loss = some_data(4, "ppo", count=6, group=3), LossSpec(name="ppo")
    outcome = good(*engine.forward_backward([PassItem("d", data, loss)]))
    logprobs = reference.forward_backward(data, loss)
    assert [x for lp in outcome.logprobs for x in lp] == pytest.approx(torch.cat(logprobs).tolist(), abs=CLOSE)
    assert distance(named_gradient(engine, "d"), reference.named(gradients=True)) < CLOSE


def test_runs_come_and_go(engine: TorchTrainerEngine) -> None:
    engine.create_run("run", LoraSpec(rank=2, seed=5))
    first = engine.export_adapter("run")
    with pytest.raises(UserError, match="exists already"):
        engine.create_run("run", LoraSpec())
    engine.drop_run("run")
    engine.drop_run("run")
    assert engine.runs == frozenset()
    torch.manual_seed(99)
    engine.create_run("run", LoraSpec(rank=2, seed=5))
    assert engine.export_adapter("run") == first
    with pytest.raises(UserError, match="trains nothing"):
        engine.create_run("idle", LoraSpec(train_attn=False, train_mlp=False))
    assert engine.runs == frozenset({"run"})
    assert engine.base_model == "tiny"
