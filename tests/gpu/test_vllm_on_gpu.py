"""The vLLM engine on a GPU: all that every engine does, in fp32; near the trainer in bfloat16, graphs and all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from services.sampler.engines.vllm_core import VllmCore
from services.sampler.engines.vllm_engine import VllmSamplerEngine
from services.sampler.engines.vllm_setup import VllmSettings, installed
from services.trainer.engines.base import PassItem
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec, PolicyRef
from shared.contracts.training import AdamParams, Datum, LossSpec
from tests.engines.conformance import SamplerConformance
from tests.engines.sampler_tools import Prefill, StartAny, ask
from tests.engines.tiny import make_tiny_model
from tests.engines.vllm_tools import HEAD, starting

pytestmark = [
    pytest.mark.skipif(not (torch.cuda.is_available() and installed()), reason="needs a GPU and vLLM"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
]
LOSS = LossSpec(name="cross_entropy")


@pytest.fixture(scope="module")
def sampler_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("vllm") / "llama", head_dim=HEAD)


@pytest.fixture(scope="module")
def reference(sampler_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(sampler_model).eval()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def core(sampler_model: Path) -> AsyncIterator[VllmCore]:
    """In fp32, since in bfloat16 greedy tokens are not those of the reference."""
    settings = VllmSettings(
        directory=str(sampler_model), device="cuda", dtype="float32", sequences=512, memory_share=0.3, eager=True
    )
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


class TestVllmOnGpu(SamplerConformance):
    """With the fixtures above."""


async def test_logprobs_of_trainer_and_sampler_agree_in_bfloat16(sampler_model: Path) -> None:
    trainer = TorchTrainerEngine("tiny", sampler_model, device="cuda")
    trainer.create_run("a", LoraSpec(rank=8, train_unembed=True))
    steady = Datum(tokens=Int32s([5, 6, 7, 8]), targets=Int32s([6, 7, 8, 9]))
    for _ in range(5):
        trainer.forward_backward([PassItem("a", [steady], LOSS)])
        trainer.optim_step({"a": AdamParams(learning_rate=0.02)})
    policy = PolicyRef(run="a", version=1)
    sampler = VllmSamplerEngine("tiny", str(sampler_model), device="cuda", memory_share=0.3)
    await sampler.start()
    try:
        await sampler.load_policy(policy, trainer.export_adapter("a"))
        result = await sampler.generate(ask([5, 6, 7], num_samples=16, max_tokens=32, seed=1, policy=policy))
    finally:
        await sampler.stop()
    whole = [[5, 6, 7, *sequence.tokens] for sequence in result.sequences]
    data = [Datum(tokens=Int32s(tokens[:-1]), targets=Int32s(tokens[1:])) for tokens in whole]
    (outcome,) = trainer.forward_backward([PassItem("a", data, LOSS, forward_only=True)])
    gaps = [
        abs(ours - theirs)
        for logprobs, sequence in zip(outcome.logprobs, result.sequences, strict=True)
        for ours, theirs in zip(list(logprobs)[2:], sequence.logprobs, strict=True)
    ]
    assert len(gaps) == 16 * 32
    assert sum(gaps) / len(gaps) <= 0.02
