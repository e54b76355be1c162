"""The vLLM engine does what every sampler engine does. Needs vLLM: `make vllm` runs this on CPUs.

One core is started for all tests, since that takes ten seconds and more; each test has an engine of its own on it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoModelForCausalLM

from services.sampler.engines.vllm_core import VllmCore
from services.sampler.engines.vllm_setup import VllmSettings, installed
from tests.engines.conformance import SamplerConformance
from tests.engines.sampler_tools import Prefill, StartAny
from tests.engines.tiny import make_tiny_model
from tests.engines.vllm_tools import HEAD, starting

pytestmark = [
    pytest.mark.skipif(not installed(), reason="needs vLLM: `make vllm` makes an environment that has it"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(400),
]


@pytest.fixture(scope="module")
def sampler_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("vllm") / "llama", head_dim=HEAD)


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
    async with starting(core, sampler_model) as begin:
        yield begin


@pytest.fixture
def prefill(core: VllmCore) -> Prefill:
    return Prefill(core.block)


class TestVllm(SamplerConformance):
    """With the fixtures above."""
