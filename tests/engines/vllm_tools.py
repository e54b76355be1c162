"""What the tests of the vLLM engine share, on CPUs and GPUs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.sampler.engines.vllm_core import VllmCore
from services.sampler.engines.vllm_engine import VllmSamplerEngine
from tests.engines.sampler_tools import StartAny

HEAD = 32
"""Size of an attention head: the least that vLLM computes on CPUs."""


@asynccontextmanager
async def starting(core: VllmCore, model: Path) -> AsyncIterator[StartAny]:
    """Starts engines on a core, or on a model that is not the core's, and stops them at the end of the block."""
    engines: list[VllmSamplerEngine] = []

    async def begin(directory: Path = model, **settings: Any) -> VllmSamplerEngine:
        shared = core if directory == model else None
        engine = VllmSamplerEngine("tiny", str(directory), core=shared, **settings)
        engines.append(engine)
        await engine.start()
        return engine

    yield begin
    for engine in engines:
        await engine.stop()
