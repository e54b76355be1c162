"""The fused layers compute what the model's own modules compute: hidden states and every run's gradient."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.trainer.engines.base import PassItem
from services.trainer.engines.body import AdaptedModel, Body
from services.trainer.engines.fused.layer import FAMILIES
from services.trainer.engines.fused.layers import FusedLayers, FusedOptions, supported
from services.trainer.engines.run_state import RunState
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import Datum, LossSpec
from shared.models import varlen
from shared.models.loading import load_base
from shared.models.lora import Adapter, AdapterBank
from shared.models.packing import Tree, grow_trees, pack
from tests.engines.tiny import VOCABULARY, make_tiny_model
from tests.engines.training import close

LOSS = LossSpec(name="cross_entropy")
SPECS = {
    "a": LoraSpec(rank=4, seed=1),
    "b": LoraSpec(rank=32, seed=2, train_attn=False, alpha=16),
    "c": LoraSpec(rank=9, seed=3, train_mlp=False),
}


def states(model: PreTrainedModel, names: str) -> dict[str, RunState]:
    """Runs in the middle of their training: B is not zero."""
    made = {}
    for number, name in enumerate(names):
        state = RunState(Adapter.fresh(model, SPECS[name]))
        noise = torch.randn(state.weights.shape, generator=torch.Generator().manual_seed(number))
        state.weights.add_(noise.to(state.weights.device), alpha=0.05)
        made[name] = state
    return made


def sequences(count: int, *, prefix: int = 0) -> dict[int, array[int]]:
    generator = torch.Generator().manual_seed(count)
    begin = torch.randint(VOCABULARY, (prefix,), generator=generator).tolist()
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    bodies = (torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths)
    return {index: array("i", begin + body) for index, body in enumerate(bodies)}


def computed(body: Body, runs: Mapping[str, RunState], data: dict[int, array[int]], size: int) -> dict[str, Tensor]:
    """Return by name each sequence's hidden states and each run's gradient of a fixed function of them."""
    trees: list[Tree] = []
    for number, run in enumerate(runs):
        part = {index: tokens for index, tokens in data.items() if index % len(runs) == number}
        trees += grow_trees(run, part, max_rows=4096, pairs_per_token=body.pairs_per_token)
    packed = pack(trees, data, next(iter(runs.values())).weights.device, masks=body.masks)
    hidden = body.forward(packed, trees, runs, backward=True)
    rows = {index: path.to(hidden.device) for index, path in packed.rows.items()}
    found = {str(index): hidden[rows[index]].float().cpu() for index in sorted(data)}
    gradient = torch.zeros_like(hidden)
    for index, tokens in data.items():  # the same for each sequence, however it is laid out
        wish = torch.randn(len(tokens), size, generator=torch.Generator().manual_seed(index))
        gradient.index_add_(0, rows[index], wish.to(gradient))
    body.backward(gradient)
    return found | {run: vector.cpu() for run, vector in body.gradients(runs).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [FusedOptions(), FusedOptions(dense_ranks=32)], ids=["dense", "grouped"])
@pytest.mark.parametrize(("names", "prefix"), [("a", 0), ("abc", 0), ("ab", 30)])
def test_hidden_states_and_gradients_are_those_of_the_models_own_modules(
    tmp_path: Path, family: str, names: str, prefix: int, options: FusedOptions
) -> None:
    model = load_base(make_tiny_model(tmp_path / family, family=family))
    data = sequences(6, prefix=prefix)
    size = model.config.hidden_size
    bank, runs = AdapterBank(model), states(model, names)
    for name, state in runs.items():
        bank.add(name, state.adapter)
    plain = computed(AdaptedModel(model, bank, None), runs, data, size)
    assert supported(model)
    fused = FusedLayers(model, options)
    ours = computed(fused, states(model, names), data, size)
    again = computed(fused, states(model, names), data, size)
    assert ours.keys() == plain.keys()
    for name, tensor in plain.items():
        assert close(ours[name], tensor), name
        assert torch.equal(ours[name], again[name]), "nothing is left from the pass before"


@pytest.mark.parametrize("options", [FusedOptions(), FusedOptions(dense_ranks=32)], ids=["dense", "grouped"])
@pytest.mark.parametrize("what", ["weights", "gradient"])
def test_a_run_that_overflows_leaves_the_others_as_they_were(tmp_path: Path, options: FusedOptions, what: str) -> None:
    directory = make_tiny_model(tmp_path / "llama")
    data = sequences(9)
    gradients = []
    for broken in (False, True):
        engine = TorchTrainerEngine("tiny", directory, fused=options)
        for number, run in enumerate("abc"):
            engine.create_run(run, LoraSpec(rank=(4, 32, 9)[number], seed=number, train_unembed=run == "c"))
            engine._states[run].weights.add_(torch.sin(torch.arange(len(engine._states[run].weights))), alpha=0.05)
        if broken and what == "weights":
            engine._states["b"].weights.fill_(1e30)
        # Log-probabilities are finite, what goes back is not.
        weight = 3e38 if broken and what == "gradient" else 1.0
        items = [
            PassItem(run, _data(data, number, weight if run == "b" else 1.0), LOSS) for number, run in enumerate("abc")
        ]
        for _ in range(2):
            outcomes = engine.forward_backward(items)
            assert [outcome.error is None for outcome in outcomes] == [True, not broken, True]
        scored = engine.forward_backward([dataclasses.replace(item, forward_only=True) for item in items])
        assert [outcome.error is None for outcome in scored] == [True, not broken, True]
        assert (engine._states["b"].gradient is None) == broken
        gradients.append([engine._states[run].gradient for run in "ac"])
    for fine, beside in zip(*gradients, strict=True):
        assert fine is not None
        assert beside is not None
        assert close(beside, fine)


def _data(data: Mapping[int, array[int]], number: int, weight: float) -> list[Datum]:
    own = [tokens for index, tokens in data.items() if index % 3 == number and len(tokens) > 1]
    return [Datum(tokens=Int32s(t[:-1]), targets=Int32s(t[1:]), weights=Float32s([weight] * (len(t) - 1))) for t in own]


def test_recomputing_activations_changes_nothing(tmp_path: Path) -> None:
    model = load_base(make_tiny_model(tmp_path / "llama"))
    data = sequences(4)
    kept, recomputed = (
        computed(FusedLayers(model, FusedOptions(recompute_rows=limit)), states(model, "ab"), data, 32)
        for limit in (None, 10)
    )
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_the_model_keeps_its_weights_under_their_names(tmp_path: Path) -> None:
    model = load_base(make_tiny_model(tmp_path / "qwen2", family="qwen2"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FusedLayers(model, FusedOptions())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    attention = model.get_submodule("model.layers.0.self_attn")
    storages = {getattr(attention, f"{name}_proj").weight.untyped_storage().data_ptr() for name in "qkv"}
    assert len(storages) == 1, "nothing is held twice"


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_families_with_other_layers_are_left_to_their_own_modules(tmp_path: Path, family: str) -> None:
    assert not supported(load_base(make_tiny_model(tmp_path / family, family=family)))


def test_layers_that_compute_something_else_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_model(tmp_path / "llama")
    assert isinstance(TorchTrainerEngine("tiny", model, fused=FusedOptions())._runner._body, FusedLayers)

    def misaligned(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        return varlen_document(q, k[: len(q)], v[: len(q)], scale=scale, window=window)

    varlen_document = varlen._document
    monkeypatch.setattr(varlen, "_document", misaligned)
    engine = TorchTrainerEngine("tiny", model, fused=FusedOptions())
    assert isinstance(engine._runner._body, AdaptedModel)
    assert "fused layers are not used" in caplog.text
