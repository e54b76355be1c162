"""The fused layers on a GPU, in bfloat16: eager, compiled and captured, they compute what a CPU does in fp32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.trainer.engines.base import PassItem
from services.trainer.engines.body import AdaptedModel
from services.trainer.engines.fused.layers import FusedLayers, FusedOptions
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossSpec
from shared.models.loading import load_base
from shared.models.lora import AdapterBank
from tests.engines.test_fused import computed, sequences, states
from tests.engines.tiny import make_tiny_model
from tests.engines.training import close

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(400)]

OPTIONS = {
    "eager": FusedOptions(),
    "compiled": FusedOptions(compile=True),
    "captured": FusedOptions(graphs=True),
    "compiled and captured": FusedOptions(compile=True, graphs=True),
    "recomputed": FusedOptions(compile=True, recompute_rows=8),
}
ROUNDING = 1.3
"""Of what bfloat16 makes of the model's own modules: how much farther ours may be from fp32."""


@pytest.mark.parametrize("name", OPTIONS)
def test_hidden_states_and_gradients_are_those_of_fp32(tmp_path: Path, name: str) -> None:
    directory = make_tiny_model(tmp_path / "qwen3", family="qwen3")
    exact, model = load_base(directory), load_base(directory, device="cuda")
    fused = FusedLayers(model, OPTIONS[name])
    bank, coarse = AdapterBank(exact), AdapterBank(model)
    size = exact.config.hidden_size
    for names, count, prefix in [("a", 6, 0), ("abc", 6, 0), ("ab", 9, 30), ("abc", 6, 0), ("a", 3, 20), ("a", 5, 0)]:
        runs, data = states(exact, names), sequences(count, prefix=prefix)
        for run, state in runs.items():
            bank.add(run, state.adapter)
        wanted = computed(AdaptedModel(exact, bank, None), runs, data, size)
        rounded = states(model, names)
        for run, state in rounded.items():
            coarse.add(run, state.adapter)
        modules = apart(computed(AdaptedModel(model, coarse, None), rounded, data, size), wanted)
        ours = apart(computed(fused, states(model, names), data, size), wanted)
        assert ours < ROUNDING * modules, (names, ours, modules)
        assert modules < 0.1, "bfloat16 is not what this test is about"


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the worst distance of hidden states and gradients, relative to their size."""
    return max(float((found[key] - tensor).norm() / tensor.norm()) for key, tensor in wanted.items())


def data_of(number: int) -> list[Datum]:
    return [
        Datum(tokens=Int32s(tokens[:-1]), targets=Int32s(tokens[1:]))
        for tokens in sequences(4, prefix=number + 2).values()
    ]


@pytest.mark.parametrize("name", ["compiled", "compiled and captured"])
def test_a_run_that_overflows_leaves_the_others_as_they_were(tmp_path: Path, name: str) -> None:
    directory = make_tiny_model(tmp_path / "llama")
    loss = LossSpec(name="cross_entropy")
    gradients = []
    for broken in (False, True):
        engine = TorchTrainerEngine("tiny", directory, device="cuda", fused=OPTIONS[name])
        for run in "abc":
            engine.create_run(run, LoraSpec(rank=16, seed=ord(run)))
        if broken:
            engine._states["b"].weights.fill_(1e30)
        outcomes = engine.forward_backward([PassItem(run, data_of(ord(run) % 5), loss) for run in "abc"])
        assert [outcome.error is None for outcome in outcomes] == [True, not broken, True]
        gradients.append([engine._states[run].gradient for run in "ac"])
    for fine, beside in zip(*gradients, strict=True):
        assert fine is not None
        assert beside is not None
        assert close(beside, fine, 1e-3)


@pytest.mark.parametrize("name", ["compiled", "compiled and captured"])
def test_many_runs_learn_in_the_same_passes(tmp_path: Path, name: str) -> None:
    directory = make_tiny_model(tmp_path / "llama")
    engine = TorchTrainerEngine("tiny", directory, device="cuda", fused=OPTIONS[name])
    runs = [f"run-{number}" for number in range(5)]
    for number, run in enumerate(runs):
        engine.create_run(run, LoraSpec(rank=(8, 16, 32)[number % 3], seed=number, train_unembed=number == 2))
    losses = []
    for _ in range(30):
        items = [PassItem(run, data_of(number), LossSpec(name="cross_entropy")) for number, run in enumerate(runs)]
        outcomes = engine.forward_backward(items)
        assert all(outcome.error is None for outcome in outcomes), outcomes
        losses.append([outcome.metrics["loss:sum"] for outcome in outcomes])
        engine.optim_step(dict.fromkeys(runs, AdamParams(learning_rate=0.01)))
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < 0.7 * first
        assert math.isfinite(last)
