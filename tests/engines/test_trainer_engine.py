"""The torch trainer engine computes what each run alone would compute, and a bad request harms only itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.engines import passes
from services.trainer.engines.base import PassItem, PassOutcome
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossName, LossSpec
from shared.errors import PermanentError, UserError
from shared.models.attention import hidden_states
from shared.models.logprobs import target_logprobs
from shared.models.packing import Packed
from tests.engines.reference import Alone, distance, exported, some_data, write
from tests.engines.tiny import CONTEXT, FAMILIES, VOCABULARY, make_tiny_model

CLOSE = 1e-5
STEPS = 5

# Runs that differ in everything that a run can differ in.
RUNS: dict[str, tuple[LoraSpec, LossSpec, AdamParams]] = {
    "a": (LoraSpec(rank=4, seed=1), LossSpec(name="cross_entropy"), AdamParams(learning_rate=1e-3)),
    "b": (
        LoraSpec(rank=8, alpha=16, train_mlp=False),
        LossSpec(name="importance_sampling"),
        AdamParams(learning_rate=4e-3, weight_decay=0.3, eps=1e-8),
    ),
    "c": (
        LoraSpec(rank=16, train_attn=False, train_unembed=True),
        LossSpec(name="ppo", params={"clip_low": 0.7, "clip_high": 1.4}),
        AdamParams(learning_rate=2e-3, grad_clip_norm=0.5, beta1=0.8, beta2=0.99, eps=1e-8),
    ),
    "d": (
        LoraSpec(rank=32, train_unembed=True, seed=4),
        LossSpec(name="cispo", params={"clip_high": 2.0}),
        AdamParams(learning_rate=5e-4, grad_clip_norm=2.0, weight_decay=0.1, eps=1e-8),
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def engine(model: Path) -> TorchTrainerEngine:
    return TorchTrainerEngine("tiny", model)


def gradient(engine: TorchTrainerEngine, run: str) -> Tensor:
    """Return what a run has gathered."""
    gathered = engine._states[run].gradient
    assert gathered is not None
    return gathered


def named_gradient(engine: TorchTrainerEngine, run: str) -> dict[str, Tensor]:
    """Return the same under the names of PEFT's file."""
    state = engine._states[run]
    pieces = iter(torch.split(gradient(engine, run), [tensor.numel() for tensor in state.adapter.tensors()]))
    return {
        f"base_model.model.{path}.lora_{name}.weight": next(pieces).view_as(tensor)
        for path, pair in state.adapter.weights.items()
        for name, tensor in zip("AB", pair, strict=True)
    }


def alone(engine: TorchTrainerEngine, run: str, model: Path, directory: Path) -> Alone:
    """Return a run as it stands, to go on by itself."""
    return Alone.load(model, write(engine.export_adapter(run), directory / run))


def good(outcome: PassOutcome) -> PassOutcome:
    assert outcome.error is None, outcome.error
    return outcome


@pytest.mark.parametrize("runs", [("a",), ("b",), ("c",), ("d",), ("a", "b", "c", "d")], ids="-".join)
def test_runs_in_one_pass_train_as_each_alone_with_peft_and_torch_adamw(
    engine: TorchTrainerEngine, model: Path, tmp_path: Path, runs: tuple[str, ...]
) -> None:
    references: dict[str, Alone] = {}
    for run in runs:
        engine.create_run(run, RUNS[run][0])
        references[run] = alone(engine, run, model, tmp_path)
    for step in range(STEPS):
        data = {run: some_data(100 * step + ord(run), RUNS[run][1].name, group=2) for run in runs}
        outcomes = engine.forward_backward([PassItem(run, data[run], RUNS[run][1]) for run in runs])
        for run, outcome in zip(runs, outcomes, strict=True):
            loss, logprobs = references[run].forward_backward(data[run], RUNS[run][1])
            assert good(outcome).metrics["loss:sum"] == pytest.approx(loss, rel=CLOSE, abs=1e-4)
            assert torch.cat(logprobs).tolist() == pytest.approx([x for lp in outcome.logprobs for x in lp], rel=CLOSE)
            assert distance(named_gradient(engine, run), references[run].named(gradients=True)) < CLOSE
        steps = engine.optim_step({run: RUNS[run][2] for run in runs})
        for run in runs:
            norm = references[run].step(RUNS[run][2])
            assert steps[run].metrics["grad_norm:mean"] == pytest.approx(norm, rel=CLOSE)
            assert steps[run].metrics["step:max"] == step + 1
    for run in runs:
        assert distance(exported(engine.export_adapter(run)), references[run].named()) < CLOSE


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo"])
def test_two_half_batches_gather_the_gradient_of_the_whole(model: Path, loss: LossName) -> None:
    data, spec = some_data(7, loss, count=6), LossSpec(name=loss)
    whole, halves = TorchTrainerEngine("tiny", model), TorchTrainerEngine("tiny", model)
    trained(whole, "run")
    trained(halves, "run")
    one = good(*whole.forward_backward([PassItem("run", data, spec)])).metrics["loss:sum"]
    parts = [good(*halves.forward_backward([PassItem("run", half, spec)])) for half in (data[:3], data[3:])]
    assert sum(part.metrics["loss:sum"] for part in parts) == pytest.approx(one, rel=CLOSE)
    assert close(gradient(halves, "run"), gradient(whole, "run"))


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo"])
@pytest.mark.parametrize(
    "settings",
    [{"max_pass_tokens": 1}, {"share_prefixes": False}, {"max_logits": 5 * VOCABULARY}, {"max_pass_tokens": 40}],
    ids="-".join,
)
def test_results_do_not_depend_on_packing_sharing_or_chunks(
    model: Path, loss: LossName, settings: dict[str, Any]
) -> None:
    data = some_data(3, loss, count=12, group=4)
    shared, other = TorchTrainerEngine("tiny", model), TorchTrainerEngine("tiny", model, **settings)
    outcomes = []
    for engine in (shared, other):
        trained(engine, "run")
        outcomes.append(good(*engine.forward_backward([PassItem("run", data, LossSpec(name=loss))])))
    assert close(gradient(shared, "run"), gradient(other, "run"))
    assert outcomes[0].metrics == pytest.approx(outcomes[1].metrics, rel=1e-4, abs=1e-5)
    for ours, theirs in zip(outcomes[0].logprobs, outcomes[1].logprobs, strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist(), abs=CLOSE)


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
    monkeypatch.setattr(passes, "hidden_states", seeing(lambda _: graded.append(torch.is_grad_enabled())))
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


NAN = float("nan")

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


def test_a_diverged_run_fails_alone_and_keeps_its_gradient(engine: TorchTrainerEngine) -> None:
    items = [PassItem(run, some_data(20, RUNS[run][1].name), RUNS[run][1]) for run in ("a", "bad", "b") if run in RUNS]
    for run in ("a", "bad", "b"):
        trained(engine, run)
    expected = expect(engine, items)
    data = some_data(21, "cross_entropy")
    good(*engine.forward_backward([PassItem("bad", data, LossSpec(name="cross_entropy"))]))
    before = gradient(engine, "bad").clone()
    engine._states["bad"].weights.mul_(1e25)
    poisoned = PassItem("bad", data, LossSpec(name="cross_entropy"))
    outcomes = engine.forward_backward([items[0], poisoned, items[1]])
    assert isinstance(outcomes[1].error, PermanentError)
    assert not isinstance(outcomes[1].error, UserError)
    assert torch.equal(gradient(engine, "bad"), before)
    for item in items:
        assert close(gradient(engine, item.run), expected[item.run], 1e-6)


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


def test_a_step_of_one_run_leaves_the_others_bit_for_bit(engine: TorchTrainerEngine) -> None:
    for run in ("a", "b"):
        trained(engine, run)
        engine.forward_backward([PassItem(run, some_data(1, RUNS[run][1].name), RUNS[run][1])])
    before = engine.snapshot("b")
    engine.optim_step({"a": AdamParams(learning_rate=0.1, weight_decay=0.9, grad_clip_norm=1e-3)})
    engine.forward_backward([PassItem("a", some_data(1, "cross_entropy"), RUNS["a"][1])])
    assert engine.snapshot("b") == before


def test_a_step_without_gradient_only_counts(engine: TorchTrainerEngine) -> None:
    trained(engine, "run")
    weights = engine.export_adapter("run")
    outcome = engine.optim_step({"run": AdamParams(weight_decay=0.5)})["run"]
    assert outcome.metrics == {"grad_norm:mean": 0.0, "update_norm:mean": 0.0, "step:max": 2.0}
    assert engine.export_adapter("run") == weights


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
    _, logprobs = reference.forward_backward(data, loss)
    assert [x for lp in outcome.logprobs for x in lp] == pytest.approx(torch.cat(logprobs).tolist(), abs=CLOSE)
    assert distance(named_gradient(engine, "d"), reference.named(gradients=True)) < CLOSE


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

    monkeypatch.setattr(passes, "hidden_states", seeing(cramped))
    items = [PassItem("run", data, LossSpec(name="ppo"))]
    items.append(PassItem("long", [longest(most + 1)], LossSpec(name="cross_entropy")))
    fits, does_not = engine.forward_backward(items)
    good(fits)
    assert close(gradient(engine, "run"), gradient(roomy, "run"))
    assert max(seen) > most
    assert "does not fit into the trainer's memory" in str(does_not.error)
    assert engine._states["long"].gradient is None


def test_memory_that_runs_out_halfway_leaves_nothing_behind(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, roomy = (TorchTrainerEngine("tiny", model, max_logits=20 * VOCABULARY) for _ in range(2))
    item = PassItem("d", some_data(3, "cispo", count=6), RUNS["d"][1])
    for each in (engine, roomy):
        trained(each, "d")
    good(*roomy.forward_backward([item]))
    chunks: list[int] = []

    def cramped(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        chunks.extend([len(rows)] * logits.requires_grad)
        if len(chunks) == 3:  # the unembedding's own gradient of two chunks is there by now
            raise torch.OutOfMemoryError("no room")
        return target_logprobs(logits, rows, targets)

    monkeypatch.setattr(passes, "target_logprobs", cramped)
    good(*engine.forward_backward([item]))
    assert len(chunks) > 4
    assert close(gradient(engine, "d"), gradient(roomy, "d"))


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


def trained(engine: TorchTrainerEngine, run: str) -> None:
    """Create a run whose B is no longer zero, so that every weight has a gradient."""
    engine.create_run(run, RUNS.get(run, RUNS["a"])[0])
    engine.forward_backward([PassItem(run, some_data(0, "cross_entropy"), LossSpec(name="cross_entropy"))])
    engine.optim_step({run: AdamParams(learning_rate=2e-2, eps=1e-8)})


def expect(engine: TorchTrainerEngine, items: list[PassItem]) -> dict[str, Tensor]:
    """Return the gradients of a pass, leaving the runs without any."""
    for outcome in engine.forward_backward(items):
        good(outcome)
    gradients = {item.run: gradient(engine, item.run) for item in items}
    for item in items:
        engine._states[item.run].gradient = None
    return gradients


def close(ours: Tensor, theirs: Tensor, tolerance: float = CLOSE) -> bool:
    return float((ours - theirs).norm()) <= tolerance * float(theirs.norm()) != 0


def seeing(look: Callable[[Packed], object]) -> Callable[..., Tensor]:
    """Return `hidden_states` that shows each layout to `look` first."""

    def instead(model: Any, packed: Packed) -> Tensor:
        look(packed)
        return hidden_states(model, packed)

    return instead


def watch_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the rows of every part computed."""
    rows: list[int] = []
    monkeypatch.setattr(passes, "hidden_states", seeing(lambda packed: rows.append(len(packed.tokens))))
    return rows


def replaced(datum: Datum, **fields: Any) -> Datum:
    return Datum(**{name: fields.get(name, getattr(datum, name)) for name in datum.__struct_fields__})


def changed(datum: Datum, name: str, place: int, value: float) -> Datum:
    """Return the datum with one value of one array changed."""
    values = getattr(datum, name)[:]
    values[place] = value
    return replaced(datum, **{name: values})


def longest(length: int) -> Datum:
    return Datum(tokens=Int32s([1] * length), targets=Int32s([2] * length))
