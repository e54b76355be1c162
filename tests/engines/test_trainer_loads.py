"""A run that begins with another's state: its weights bit for bit, its optimizer if asked, nothing else."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from services.trainer.engines.base import PassItem
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.policies import LoraSpec
from shared.errors import PermanentError
from tests.engines.reference import some_data
from tests.engines.training import RUNS, good

LORA, LOSS, ADAM = RUNS["d"]


def step(engine: TorchTrainerEngine, run: str, seed: int) -> None:
    good(*engine.forward_backward([PassItem(run, some_data(seed, "cispo"), LOSS)]))
    assert not engine.optim_step({run: ADAM})[run].error


@pytest.fixture
def saved(engine: TorchTrainerEngine) -> bytes:
    """The state of run `from` after some steps, with a gathered gradient."""
    engine.create_run("from", LORA)
    for seed in range(3):
        step(engine, "from", seed)
    good(*engine.forward_backward([PassItem("from", some_data(9, "cispo"), LOSS)]))
    return engine.snapshot("from")


def test_with_the_optimizer_it_goes_on_as_the_other_would_without_its_gradient(
    engine: TorchTrainerEngine, saved: bytes
) -> None:
    engine.restore("to", engine.begun_from(saved, LORA, optimizer=True))
    assert engine._states["to"].gradient is None
    engine._states["from"].gradient = None
    for run in ("from", "to"):
        step(engine, run, 20)
    assert engine.snapshot("to") == engine.snapshot("from")


def test_without_the_optimizer_it_has_the_weights_and_begins_anew(engine: TorchTrainerEngine, saved: bytes) -> None:
    engine.restore("to", engine.begun_from(saved, LORA, optimizer=False))
    ours, theirs = engine._states["to"], engine._states["from"]
    assert torch.equal(ours.weights, theirs.weights)
    assert not ours.moments.mean.any()
    assert not ours.moments.square.any()
    assert (ours.step, ours.gradient) == (0, None)


def test_it_touches_no_run_and_gives_the_same_bytes_again(engine: TorchTrainerEngine, saved: bytes) -> None:
    begun = engine.begun_from(saved, LORA, optimizer=True)
    assert engine.begun_from(begun, LORA, optimizer=True) == begun
    assert engine.begun_from(saved, LORA, optimizer=True) == begun
    assert engine.runs == {"from"}
    assert engine.snapshot("from") == saved


def test_how_the_weights_began_may_differ_and_is_the_runs_own(engine: TorchTrainerEngine, saved: bytes) -> None:
    lora = msgspec.structs.replace(LORA, seed=77)
    engine.restore("to", engine.begun_from(saved, lora, optimizer=True))
    assert engine._states["to"].adapter.spec == lora


@pytest.mark.parametrize("changes", [{"rank": 8}, {"alpha": 5.0}, {"train_mlp": False}, {"train_unembed": False}])
def test_another_shape_is_refused(engine: TorchTrainerEngine, saved: bytes, changes: dict[str, float | bool]) -> None:
    lora: LoraSpec = msgspec.structs.replace(LORA, **changes)
    with pytest.raises(PermanentError, match="their shapes differ"):
        engine.begun_from(saved, lora, optimizer=False)


def test_what_is_no_state_of_this_model_is_refused(engine: TorchTrainerEngine, saved: bytes, model: Path) -> None:
    engine._states["from"].weights[3] = float("nan")
    cases = [
        (engine, saved[: len(saved) // 2], "no intact safetensors"),
        (engine, engine.snapshot("from"), "not finite"),
        (TorchTrainerEngine("other", model), saved, "base model 'tiny'"),
        (engine, saved.replace(b"layers.1.mlp.up_proj", b"layers.7.mlp.up_proj"), "other names or shapes"),
    ]
    for there, data, text in cases:
        with pytest.raises(PermanentError, match=text):
            there.begun_from(data, LORA, optimizer=True)
