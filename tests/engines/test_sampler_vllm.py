"""The vLLM engine does what every sampler engine does. Needs vLLM: `make vllm` runs this on CPUs.

One core is started for each model, since that takes ten seconds and more; each test has an engine of its own on it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoModelForCausalLM

from services.sampler.engines.vllm_core import VllmCore
from services.sampler.engines.vllm_engine import VllmSamplerEngine
from services.sampler.engines.vllm_setup import VllmSettings, installed
from tests.engines.conformance import SamplerConformance
from tests.engines.sampler_tools import Prefill, StartAny
from tests.engines.tiny import make_tiny_model

pytestmark = [
    pytest.mark.skipif(not installed(), reason="needs vLLM: `make vllm` makes an environment that has it"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
]
SMALLEST_HEAD = 32
"""Of vLLM's attention on CPUs."""


@pytest.fixture(scope="module")
def sampler_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("vllm") / "llama", head_dim=SMALLEST_HEAD)


@pytest.fixture(scope="module")
def reference(sampler_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(sampler_model).eval()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def core(sampler_model: Path) -> AsyncIterator[VllmCore]:
    settings = VllmSettings(directory=str(sampler_model), sequences=512, cache_bytes=1 << 28, threads=1)
    started = await VllmCore.start(settings)
    yield started
    await started.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def start(sampler_model: Path, core: VllmCore) -> AsyncIterator[StartAny]:
    engines: list[VllmSamplerEngine] = []

    async def begin(model: Path = sampler_model, **settings: Any) -> VllmSamplerEngine:
        shared = core if model == sampler_model else None
        engine = VllmSamplerEngine("tiny", str(model), core=shared, **settings)
        engines.append(engine)
        await engine.start()
        return engine

    yield begin
    for engine in engines:
        await engine.stop()


@pytest.fixture
def prefill(core: VllmCore) -> Prefill:
    return Prefill(core.block)


class TestVllm(SamplerConformance):
    """With the fixtures above."""
