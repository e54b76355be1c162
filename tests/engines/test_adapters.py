"""Adapters of many runs over one model stay apart, and their files are PEFT's or are refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.contracts.policies import LoraSpec
from shared.errors import PermanentError, UserError
from shared.models.adapter_files import from_peft, to_peft
from shared.models.loading import load_base
from shared.models.lora import Adapter, AdapterBank, AdapterLinear
from tests.engines.reference import load_peft, write
from tests.engines.tiny import make_tiny_model

IDS = torch.arange(40).reshape(2, 20) * 5 % 256
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"), tied=True)


@pytest.fixture
def model(directory: Path) -> PreTrainedModel:
    return load_base(directory)


def adapter(model: PreTrainedModel, seed: int, rank: int = 4) -> Adapter:
    """Return an adapter that changes what the model says."""
    made = Adapter.fresh(model, LoraSpec(rank=rank, seed=seed, train_unembed=True))
    generator = torch.Generator().manual_seed(seed)
    for _, b in made.weights.values():
        b.normal_(0, 0.1, generator=generator)
    return made


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model(IDS).logits
    return result


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_only(model: PreTrainedModel) -> None:
    before = logits(model)
    first = Adapter.fresh(model, LoraSpec(rank=4, seed=7))
    torch.manual_seed(1)
    bank = AdapterBank(model)
    bank.add("run", first)
    with bank.use([("run", 0, IDS.numel())]):
        assert torch.equal(logits(model), before)
    again, other = (Adapter.fresh(model, LoraSpec(rank=4, seed=seed)) for seed in (7, 8))
    assert all(map(torch.equal, first.tensors(), again.tensors()))
    assert not all(map(torch.equal, first.tensors(), other.tensors()))
    assert torch.equal(*(next(Adapter.fresh(model, LoraSpec(seed=seed)).tensors()) for seed in (None, 0)))


def test_rows_go_through_their_own_adapter_and_others_through_none(model: PreTrainedModel) -> None:
    base = logits(model)
    bank = AdapterBank(model)
    bank.add("one", adapter(model, 1))
    bank.add("two", adapter(model, 2, rank=8))
    whole = {}
    for key in ("one", "two"):
        with bank.use([(key, 0, 40)]):
            whole[key] = logits(model)
    # a causal model: the first rows of a sequence do not see what later ones go through
    with bank.use([("two", 0, 10), (None, 10, 20), ("one", 20, 40)]):
        mixed = logits(model)
    assert torch.allclose(mixed[0, :10], whole["two"][0, :10], atol=1e-5)
    assert torch.allclose(mixed[1], whole["one"][1], atol=1e-5)
    assert not torch.allclose(mixed[0, 10:], whole["two"][0, 10:], atol=1e-2)
    with bank.use([(None, 0, 40)]):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)


def test_uses_nest_and_end_with_an_error(model: PreTrainedModel) -> None:
    bank = AdapterBank(model)
    bank.add("one", adapter(model, 1))
    base = logits(model)
    with bank.use([("one", 0, 40)]):
        outer = logits(model)
        with bank.use([]):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), outer)
        with pytest.raises(IndexError), bank.use([]):
            model(torch.tensor([[9999]]))
        assert torch.equal(logits(model), outer)
    with pytest.raises(KeyError), bank.use([("ghost", 0, 40)]):
        pass
    assert torch.equal(logits(model), base)


def test_a_second_bank_of_a_model_is_the_same_bank(model: PreTrainedModel) -> None:
    names = [name for name, _ in model.named_parameters()]
    first = AdapterBank(model)
    first.add("one", adapter(model, 1))
    second = AdapterBank(model)
    assert second.keys == {"one"}
    second.remove("one")
    second.remove("one")
    assert first.keys == frozenset()
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model.lm_head, AdapterLinear)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_an_adapter_for_sampling_is_cast_once_and_one_for_training_stays(directory: Path) -> None:
    model = load_base(directory, dtype="bfloat16")
    bank = AdapterBank(model)
    frozen, trained = adapter(model, 1), adapter(model, 1)
    for tensor in trained.tensors():
        tensor.requires_grad_()
    for key, each in (("frozen", frozen), ("trained", trained)):
        bank.add(key, each)
    with bank.use([("frozen", 0, 40)]):
        expected = logits(model)
    with bank.use([("trained", 0, 40)]):
        assert torch.equal(logits(model), expected)
        torch.autograd.backward(model(IDS).logits.float().sum())
    assert {tensor.dtype for tensor in bank._active.adapters["frozen"].tensors()} == {torch.bfloat16}
    gradients = [tensor.grad for tensor in trained.tensors() if tensor.grad is not None]
    assert len(gradients) == len(list(trained.tensors()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_files_survive_the_round_trip_and_mean_the_same_to_peft(
    directory: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    original = adapter(model, 3)
    files = to_peft(original, "tiny")
    again = from_peft(files, model)
    assert all(map(torch.equal, original.tensors(), again.tensors()))
    assert again.spec == LoraSpec(rank=4, train_unembed=True)
    assert to_peft(again, "tiny") == files  # equal weights give equal bytes: they are checksummed
    bank = AdapterBank(model)
    bank.add("run", again)
    with bank.use([("run", 0, 40)]):
        ours = logits(model)
    with torch.no_grad():
        theirs = load_peft(directory, write(files, tmp_path / "adapter"))(input_ids=IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_an_adapter_of_few_layers_is_read_too(model: PreTrainedModel) -> None:
    few = {path: pair for path, pair in adapter(model, 1).weights.items() if path.endswith("q_proj")}
    read = from_peft(to_peft(Adapter(LoraSpec(rank=4), few), "tiny"), model)
    assert read.weights.keys() == few.keys()
    assert (read.spec.train_attn, read.spec.train_mlp, read.spec.train_unembed) == (True, False, False)


def configured(**settings: object) -> Callable[[Files], Files]:
    """Return what changes the configuration."""
    return lambda files: (
        files | {"adapter_config.json": json.dumps(json.loads(files["adapter_config.json"]) | settings).encode()}
    )


def weighted(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Files], Files]:
    """Return what changes the tensors."""

    def apply(files: Files) -> Files:
        tensors = safetensors.torch.load(files["adapter_model.safetensors"])
        change(tensors)
        return files | {"adapter_model.safetensors": safetensors.torch.save(tensors)}

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

SPOILT: dict[str, tuple[Callable[[Files], Files], str]] = {
    "no config": (lambda files: {k: v for k, v in files.items() if "config" not in k}, "no adapter_config.json"),
    "no weights": (lambda files: {k: v for k, v in files.items() if "config" in k}, "no adapter_model.safetensors"),
    "config of garbage": (lambda files: files | {"adapter_config.json": b"{"}, "not JSON"),
    "config that is a list": (lambda files: files | {"adapter_config.json": b"[]"}, "not a JSON object"),
    "another method": (configured(peft_type="IA3"), "peft_type 'IA3'"),
    "DoRA": (configured(use_dora=True), "use_dora True"),
    "biases": (configured(bias="all"), "bias 'all'"),
    "whole modules": (configured(modules_to_save=["lm_head"]), "modules_to_save"),
    "ranks by layer": (configured(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "rank of text": (configured(r="4"), "r '4'"),
    "rank too large": (configured(r=4096), "from 1 to 128"),
    "another rank": (configured(r=8), r"is \[4, 32\]: it must be \[8, 32\]"),
    "alpha of zero": (configured(lora_alpha=0), "positive"),
    "cut weights": (lambda f: f | {"adapter_model.safetensors": f["adapter_model.safetensors"][:99]}, "damaged"),
    "no tensors": (weighted(dict.clear), "no adapter weights"),
    "half a pair": (weighted(lambda t: t.pop(Q)), "no lora_A for model.layers.0.self_attn.q_proj"),
    "wrong shape": (weighted(lambda t: t.update({Q: torch.ones(4, 5)})), r"is \[4, 5\]"),
    "NaN": (weighted(lambda t: t[Q].fill_(float("nan"))), "not finite"),
    "an embedding": (weighted(lambda t: t.update({"base_model.model.x.weight": t[Q].clone()})), "has an entry"),
    "another model": (
        weighted(lambda t: t.update({Q.replace("layers.0", "layers.9"): t[Q].clone()})),
        "model.layers.9.self_attn.q_proj, which is no linear layer",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_files_that_cannot_be_used_are_refused_with_the_reason(model: PreTrainedModel, case: str) -> None:
    spoil, text = SPOILT[case]
    with pytest.raises(PermanentError, match=text):
        from_peft(spoil(to_peft(adapter(model, 1), "tiny")), model)


def emptied(directory: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in directory.glob(pattern):
            path.unlink()
    return directory


def test_a_model_that_cannot_be_loaded_is_refused_with_the_reason(tmp_path: Path) -> None:
    def made(name: str) -> Path:
        return make_tiny_model(tmp_path / name)

    other = made("other")
    (other / "config.json").write_text('{"model_type": "mamba"}')
    partial = made("partial")
    tensors = safetensors.torch.load_file(partial / "model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    cut = made("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    cases: list[tuple[str | Path, str]] = [
        (tmp_path / "nowhere", "does not exist"),
        (str(tmp_path / "nowhere"), "does not exist"),
        (emptied(made("bare"), "config.json"), "no config.json"),
        (emptied(made("light"), "*.safetensors"), "no weights"),
        (other, "family 'mamba'"),
        (partial, "lack model.norm.weight"),
        (cut, "cannot be read"),
    ]
    for directory, text in cases:
        with pytest.raises(UserError, match=text):
            load_base(directory)
    with pytest.raises(UserError, match="dtype 'int4' is unknown"):
        load_base(made("good"), dtype="int4")


def test_a_loaded_model_is_frozen(directory: Path) -> None:
    model = load_base(directory)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.dtype == torch.float32
