"""What the tests of the trainer engine share: runs that differ in everything, and small changes of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from services.trainer.engines import body
from services.trainer.engines.base import PassItem, PassOutcome
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossName, LossSpec
from shared.models.attention import hidden_states
from shared.models.packing import Packed
from tests.engines.reference import Alone, some_data, write

CLOSE = 1e-5

LOSSES: tuple[LossName, ...] = get_args(LossName)

# Runs that differ in everything that a run can differ in; any four neighbours differ in rank, loss and learning rate.
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
    "e": (LoraSpec(rank=4, seed=5), LossSpec(name="dro"), AdamParams(learning_rate=3e-3, eps=1e-8)),
    "f": (
        LoraSpec(rank=8, train_unembed=True),
        LossSpec(name="gspo", params={"clip_low": 0.6, "clip_high": 1.5}),
        AdamParams(learning_rate=1.5e-3, grad_clip_norm=1.0, eps=1e-8),
    ),
    "g": (
        LoraSpec(rank=16, alpha=8, seed=7),
        LossSpec(name="stable_reinforce", params={"kl_coeff": 0.3, "clip_high": 1.5}),
        AdamParams(learning_rate=2.5e-3, weight_decay=0.2, eps=1e-8),
    ),
    "h": (LoraSpec(rank=32, train_mlp=False), LossSpec(name="cross_entropy"), AdamParams(learning_rate=8e-4, eps=1e-8)),
}
WIDE = {"h": 3}
"""Targets of a token, where there are several."""


def data_of(run: str, seed: int, **settings: Any) -> list[Datum]:
    """Return data for one of `RUNS`."""
    return some_data(seed, RUNS[run][1].name, width=WIDE.get(run, 1), **settings)


def changing(adam: AdamParams, step: int) -> AdamParams:
    """Return settings of which each differs from those of every other step."""
    return AdamParams(
        learning_rate=adam.learning_rate * (1 + 0.3 * step),
        beta1=adam.beta1 - 0.05 * step,
        beta2=adam.beta2 - 0.02 * step,
        eps=adam.eps * 10**step,
        weight_decay=adam.weight_decay + 0.05 * step,
        grad_clip_norm=adam.grad_clip_norm + 0.4 * step,
    )


def joined(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of a batch from those of its parts, each joined as its name says; means are over tokens."""
    tokens = [part["tokens:sum"] for part in parts]
    ways: dict[str, Callable[[list[float]], float]] = {
        "sum": sum,
        "max": max,
        "mean": lambda values: sum(v * n for v, n in zip(values, tokens, strict=True)) / sum(tokens),
    }
    return {name: ways[name.partition(":")[2]]([part[name] for part in parts]) for name in parts[0]}


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
        f"base_model.model.{path}.lora_{'AB'[which]}.weight": next(pieces).view_as(state.adapter.weights[path][which])
        for path, which in state.adapter.places
    }


def alone(engine: TorchTrainerEngine, run: str, model: Path, directory: Path) -> Alone:
    """Return a run as it stands, to go on by itself."""
    return Alone.load(model, write(engine.export_adapter(run), directory / run))


def good(outcome: PassOutcome) -> PassOutcome:
    assert outcome.error is None, outcome.error
    return outcome


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
    monkeypatch.setattr(body, "hidden_states", seeing(lambda packed: rows.append(len(packed.tokens))))
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
