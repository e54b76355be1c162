"""Fixtures of the engines' tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from services.sampler.engines.torch_engine import TorchSamplerEngine
from services.trainer.engines.torch_engine import TorchTrainerEngine
from tests.engines.sampler_tools import Prefill, Start
from tests.engines.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def engine(model: Path) -> TorchTrainerEngine:
    return TorchTrainerEngine("tiny", model)


@pytest.fixture(scope="module")
def sampler_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def reference(sampler_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(sampler_model).eval()


@pytest.fixture
async def start(sampler_model: Path) -> AsyncIterator[Start]:
    """Start engines, and stop them when the test ends."""
    engines: list[TorchSamplerEngine] = []

    async def begin(model: Path = sampler_model, **settings: Any) -> TorchSamplerEngine:
        engine = TorchSamplerEngine("tiny", str(model), **{"threads": 1, "cache_bytes": 1 << 28, **settings})
        engines.append(engine)
        await engine.start()
        return engine

    yield begin
    for engine in engines:
        await engine.stop()


@pytest.fixture
def tolerance() -> float:
    """By how much log-probabilities may differ from the reference's."""
    return 1e-4


@pytest.fixture
def prefill() -> Prefill:
    """What the engine computes again of prompts."""
    return Prefill()
