"""What only the vLLM engine has: prompts in several steps, tied unembeddings, room for ranks, processes that end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from services.sampler.engines.vllm_engine import VllmSamplerEngine
from services.sampler.engines.vllm_setup import installed, room_for
from shared.contracts.policies import PolicyRef
from shared.errors import PermanentError, UserError
from tests.engines.reference import load_peft, write
from tests.engines.sampler_tools import ask, logprobs_of, policy_files, tokens
from tests.engines.tiny import make_tiny_model
from tests.engines.vllm_tools import HEAD

needs_vllm = pytest.mark.skipif(not installed(), reason="needs vLLM: `make vllm` makes an environment that has it")
pytestmark = pytest.mark.timeout(300)
in_one_loop = pytest.mark.asyncio(loop_scope="module")
LONG = [at * 7 % 250 for at in range(300)]


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("vllm") / "tied", tied=True, head_dim=HEAD)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tied_model: Path) -> AsyncIterator[VllmSamplerEngine]:
    """With steps of 64 tokens, so that longer prompts take several, and room for low ranks."""
    settings: dict[str, Any] = {"cache_bytes": 1 << 28, "threads": 1, "max_sequences": 8, "max_rank": 5}
    started = VllmSamplerEngine("tiny", str(tied_model), prefill_tokens=64, **settings)
    await started.start()
    yield started
    await started.stop()


@needs_vllm
@in_one_loop
async def test_a_prompt_that_takes_several_steps_is_scored_whole(engine: VllmSamplerEngine, tied_model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tied_model).eval()
    asked = [ask(LONG, prompt_logprobs=True, prompt_logprobs_last_n=last, max_tokens=2) for last in (None, 100)]
    whole, part = await asyncio.gather(*map(engine.generate, asked))
    assert whole.prompt_logprobs is not None
    assert part.prompt_logprobs is not None
    expected = logprobs_of(reference, LONG[:1], LONG[1:])
    torch.testing.assert_close(torch.tensor(whole.prompt_logprobs)[1:], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(part.prompt_logprobs)[200:], expected[199:], atol=1e-4, rtol=0)


@needs_vllm
@in_one_loop
async def test_an_adapted_unembedding_leaves_the_tied_embedding_alone(
    engine: VllmSamplerEngine, tied_model: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tied_model).eval()
    _, files = policy_files(base, 1, train_unembed=True)
    policy = PolicyRef(run="run", version=1)
    await engine.load_policy(policy, files)
    model = load_peft(tied_model, write(files, tmp_path / "policy"))
    result = await engine.generate(ask(LONG, policy=policy, prompt_logprobs=True, temperature=0))
    expected = logprobs_of(model, LONG[:1], [*LONG[1:], *tokens(result)])
    found = torch.tensor([*result.prompt_logprobs[1:], *result.sequences[0].logprobs])  # type: ignore[index]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@needs_vllm
@in_one_loop
async def test_a_policy_of_too_high_a_rank_is_refused_with_the_way_out(
    engine: VllmSamplerEngine, tied_model: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tied_model).eval()
    with pytest.raises(PermanentError, match="rank 16: this sampler has room for 8; start it with max_rank 16"):
        await engine.load_policy(PolicyRef(run="high", version=1), policy_files(base, 0, rank=16)[1])


@pytest.mark.parametrize(("wanted", "room"), [(1, 1), (2, 8), (32, 32), (33, 64), (128, 128)])
def test_room_is_made_for_the_next_rank_that_vllm_knows(wanted: int, room: int) -> None:
    assert room_for(wanted) == room


def test_room_for_no_or_too_high_a_rank_is_refused() -> None:
    for wanted in (0, 129):
        with pytest.raises(UserError, match=f"max_rank {wanted}: it goes from 1 to 128"):
            room_for(wanted)


@pytest.mark.skipif(installed(), reason="vLLM is installed")
async def test_without_vllm_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    engine = VllmSamplerEngine("tiny", str(make_tiny_model(tmp_path / "model")))
    with pytest.raises(UserError, match="vLLM, which is not installed here: `make vllm`"):
        await engine.start()


STARTER = """
import asyncio, sys
from services.sampler.engines.vllm_engine import VllmSamplerEngine

async def main():
    engine = VllmSamplerEngine("tiny", sys.argv[1], cache_bytes=1 << 28, threads=1)
    await engine.start()
    print("started", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@needs_vllm
def test_a_sampler_that_is_killed_leaves_no_process_behind(tied_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "starter.py"
    script.write_text(STARTER)
    root = Path(__file__).parents[2]
    sampler = subprocess.Popen(
        [sys.executable, str(script), str(tied_model)], stdout=subprocess.PIPE, text=True, env=_path(root)
    )
    try:
        assert sampler.stdout is not None
        lines = iter(sampler.stdout.readline, "")
        assert any("started" in line for line in lines)
        children = psutil.Process(sampler.pid).children(recursive=True)
        assert len(children) >= 2
    finally:
        sampler.send_signal(signal.SIGKILL)
        sampler.wait()
        sampler.stdout.close()  # type: ignore[union-attr]
    give_up = time.monotonic() + 60
    while left := [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < give_up, left
        time.sleep(0.2)


def _path(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}
