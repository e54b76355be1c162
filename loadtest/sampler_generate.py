"""The torch engine against transformers' own `model.generate`: the same batch, in turns, in one process.

Both draw from the full distribution at temperature 1 and give exactly so many new tokens for each prompt. The engine is
asked through its own interface and also gives log-probabilities, which `generate` is not asked for.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from loadtest.sampler_rows import Row
from services.sampler.engines.torch_engine import TorchSamplerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.sampling import SampleRequest, SamplingParams
from shared.models.loading import load_base


@dataclass(frozen=True)
class GenerateCase:
    """One batch."""

    batch: int
    prompt: int
    """Tokens of each prompt; of the longest one where they are ragged."""
    new: int
    ragged: bool = False
    """Prompts of all lengths from a quarter of `prompt` on."""

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"generate-{self.batch}x{self.prompt}+{self.new}{'-ragged' if self.ragged else ''}"


CPU_CASES = [
    GenerateCase(1, 16, 32),
    GenerateCase(1, 128, 32),
    GenerateCase(4, 16, 32),
    GenerateCase(8, 128, 16, ragged=True),
    GenerateCase(16, 16, 32),
    GenerateCase(16, 64, 32, ragged=True),
    GenerateCase(32, 16, 32),
    GenerateCase(32, 128, 16),
]
GPU_CASES = [
    GenerateCase(1, 128, 128),
    GenerateCase(32, 128, 128),
    GenerateCase(32, 512, 128, ragged=True),
    GenerateCase(128, 128, 128),
]


def prompts_of(case: GenerateCase, vocabulary: int) -> list[list[int]]:
    """Draw the prompts of a case, the same ones each time."""
    draw = random.Random(case.name)
    lengths = [draw.randint(case.prompt // 4, case.prompt) if case.ragged else case.prompt for _ in range(case.batch)]
    lengths[0] = case.prompt
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


async def measure(
    directory: str, device: str, repeats: int, threads: int, cases: list[GenerateCase]
) -> AsyncIterator[Row]:
    """Yield a row for each case."""
    torch.set_num_threads(threads)
    most = max(case.batch for case in cases)
    engine = TorchSamplerEngine("measured", directory, device=device, max_sequences=most, threads=threads)
    await engine.start()
    model = load_base(directory, device=device)
    model.set_attn_implementation("sdpa")
    try:
        for case in cases:
            yield await _row(case, engine, model, repeats)
    finally:
        await engine.stop()


async def _row(case: GenerateCase, engine: TorchSamplerEngine, model: PreTrainedModel, repeats: int) -> Row:
    prompts = prompts_of(case, model.config.vocab_size)
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(repeats + 1):  # the first one warms up
        seconds = (await _engine(case, engine, prompts), await asyncio.to_thread(_generate, case, model, prompts))
        if turn:
            ours.append(seconds[0])
            theirs.append(seconds[1])
    tokens = case.batch * case.new
    # The best of each: whatever else runs on a machine makes either only slower.
    ratio = min(theirs) / min(ours)
    return Row(
        case.name,
        {
            "tok/s": tokens / min(ours),
            "generate tok/s": tokens / min(theirs),
            "x generate": ratio,
        },
        {"x generate": 1.0},
    )


async def _engine(case: GenerateCase, engine: TorchSamplerEngine, prompts: list[list[int]]) -> float:
    params = SamplingParams(max_tokens=case.new, stop=[])
    began = time.perf_counter()
    results = await asyncio.gather(
        *(
            engine.generate(SampleRequest(request_id="", base_model="measured", prompt=Int32s(prompt), params=params))
            for prompt in prompts
        )
    )
    assert sum(len(result.sequences[0].tokens) for result in results) == case.batch * case.new
    return time.perf_counter() - began


@torch.inference_mode()
def _generate(case: GenerateCase, model: PreTrainedModel, prompts: list[list[int]]) -> float:
    began = time.perf_counter()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=case.new,
        max_new_tokens=case.new,
        eos_token_id=None,
        pad_token_id=0,
    )
    out = out.tolist()
    assert len(out[0]) == longest + case.new
    return time.perf_counter() - began
