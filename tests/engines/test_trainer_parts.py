"""An operation that is cut into parts gives what it gives in one piece, or nothing; a parked run loses no bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from services.trainer.engines import keeper, torch_engine
from services.trainer.engines.base import NoRoom, PassItem, PassOutcome
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Float32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossName, LossSpec
from shared.errors import UserError
from tests.engines.reference import some_data
from tests.engines.tiny import VOCABULARY
from tests.engines.training import RUNS, changed, close, good, gradient, replaced, trained

PPO = LossSpec(name="ppo")


def part(data: Sequence[Datum], first: int, stop: int, loss: LossSpec = PPO, *, forward_only: bool = False) -> PassItem:
    return PassItem("run", data[first:stop], loss, forward_only, first=not first, rest=data[stop:])


def in_parts(engine: TorchTrainerEngine, data: Sequence[Datum], cuts: list[int], loss: LossSpec) -> PassOutcome:
    for first, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        before = engine.snapshot("run")
        (outcome,) = engine.forward_backward([part(data, first, stop, loss)])
        good(outcome)
        if stop < len(data):
            assert not outcome.metrics
            assert not outcome.logprobs
            assert engine.snapshot("run") == before, "no snapshot has a part of an operation"
    return outcome


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo"])
def test_parts_give_the_metrics_logprobs_and_gradient_of_the_whole(model: Path, loss: LossName) -> None:
    data, spec = some_data(3, loss, count=7), LossSpec(name=loss)
    whole, cut = TorchTrainerEngine("tiny", model), TorchTrainerEngine("tiny", model)
    for each in (whole, cut):
        trained(each, "run")
        good(*each.forward_backward([PassItem("run", some_data(2, loss), spec)]))  # gathered before
    one = good(*whole.forward_backward([PassItem("run", data, spec)]))
    joined = in_parts(cut, data, [2, 3, 6], spec)
    assert joined.metrics == pytest.approx(one.metrics, rel=1e-5)
    assert set(joined.metrics) == set(one.metrics)
    assert [len(ours) for ours in joined.logprobs] == [len(datum.tokens) for datum in data]
    for ours, theirs in zip(joined.logprobs, one.logprobs, strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-5)
    assert close(gradient(cut, "run"), gradient(whole, "run"))


def test_parts_that_are_only_evaluated_leave_no_gradient(engine: TorchTrainerEngine) -> None:
    trained(engine, "run")
    data = some_data(3, "ppo")
    one = good(*engine.forward_backward([PassItem("run", data, PPO, forward_only=True)]))
    good(*engine.forward_backward([part(data, 0, 2, forward_only=True)]))
    joined = good(*engine.forward_backward([part(data, 2, 4, forward_only=True)]))
    assert joined.metrics == pytest.approx(one.metrics, rel=1e-6)
    assert engine._states["run"].gradient is None


def test_a_part_that_fails_undoes_the_parts_before(engine: TorchTrainerEngine, model: Path) -> None:
    trained(engine, "run")
    data = some_data(3, "importance_sampling")
    loss = LossSpec(name="importance_sampling")
    good(*engine.forward_backward([PassItem("run", some_data(2, "ppo"), PPO)]))
    before = engine.snapshot("run")
    huge = replaced(data[3], logprobs=Float32s([-300.0] * len(data[3].tokens)))
    spoilt = [*data[:3], huge]
    good(*engine.forward_backward([part(spoilt, 0, 3, loss)]))
    (outcome,) = engine.forward_backward([part(spoilt, 3, 4, loss)])
    assert "the loss is" in str(outcome.error)
    assert engine.snapshot("run") == before
    assert engine._states["run"].pending is None
    (late,) = engine.forward_backward([part(data, 2, 4, loss)])
    assert "no earlier part" in str(late.error)


def test_wrong_data_are_refused_with_the_first_part_and_named_as_in_the_whole(engine: TorchTrainerEngine) -> None:
    trained(engine, "run")
    data = some_data(3, "ppo")
    data[3] = changed(data[3], "tokens", 1, VOCABULARY)
    (outcome,) = engine.forward_backward([part(data, 0, 2)])
    assert "datum 3: tokens[1] is 264" in str(outcome.error)


def test_an_operation_sent_again_from_the_beginning_counts_once(engine: TorchTrainerEngine, model: Path) -> None:
    other = TorchTrainerEngine("tiny", model)
    data = some_data(3, "ppo")
    for each in (engine, other):
        trained(each, "run")
    good(*engine.forward_backward([part(data, 0, 3)]))
    for each in (engine, other):
        in_parts(each, data, [2], PPO)
    assert torch.equal(gradient(engine, "run"), gradient(other, "run"))


def test_a_snapshot_between_parts_is_the_run_before_the_operation(engine: TorchTrainerEngine, model: Path) -> None:
    trained(engine, "run")
    data = some_data(3, "ppo")
    good(*engine.forward_backward([part(data, 0, 2)]))
    other = TorchTrainerEngine("tiny", model)
    other.restore("run", engine.snapshot("run"))
    good(*engine.forward_backward([part(data, 2, 4)]))
    in_parts(other, data, [2], PPO)  # the replay, from the operation's first datum
    assert torch.equal(gradient(engine, "run"), gradient(other, "run"))


def test_a_run_that_is_parked_and_brought_back_goes_on_bit_for_bit(engine: TorchTrainerEngine, model: Path) -> None:
    never = TorchTrainerEngine("tiny", model)
    data, (lora, loss, adam) = some_data(3, "cispo"), RUNS["d"]
    for each in (engine, never):
        each.create_run("run", lora)
    for step in range(3):
        for each in (engine, never):
            good(*each.forward_backward([PassItem("run", some_data(step, "cispo"), loss)]))
            good(*each.forward_backward([part(data, 0, 2, loss)]))
        before = engine.snapshot("run"), engine.export_adapter("run"), engine.size_of("run")
        engine.park("run")
        engine.park("run")
        assert "run" not in engine._bank.keys
        assert (engine.snapshot("run"), engine.export_adapter("run"), engine.size_of("run")) == before
        if step == 1:
            engine.bring_back("run")  # a pass would bring it back by itself
        for each in (engine, never):
            good(*each.forward_backward([part(data, 2, 4, loss)]))
        engine.park("run")
        for each in (engine, never):
            assert not each.optim_step({"run": adam})["run"].error
    assert engine.snapshot("run") == never.snapshot("run")


def test_memory_that_runs_out_when_a_run_comes_changes_nothing(
    engine: TorchTrainerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(engine, "run")
    state = engine.snapshot("run")
    engine.park("run")

    def cramped(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(keeper.Keeper, "_to_device", cramped)
        patch.setattr(torch_engine, "RunState", cramped)
        patch.setattr(torch_engine, "read_state", cramped)
        with pytest.raises(NoRoom, match="no memory is left on cpu for run 'run'"):
            engine.bring_back("run")
        with pytest.raises(NoRoom):
            engine.create_run("new", LoraSpec())
        with pytest.raises(NoRoom):
            engine.restore("other", state)
        (outcome,) = engine.forward_backward([PassItem("run", some_data(1, "ppo"), PPO)])
        assert isinstance(outcome.error, NoRoom)
    assert engine.runs == {"run"}
    assert engine.snapshot("run") == state
    assert not engine.optim_step({"run": AdamParams()})["run"].error
    with pytest.raises(UserError, match="not on this trainer"):
        engine.size_of("new")
