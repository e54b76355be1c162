"""An engine without the bus, in a process of its own, so that its memory is free again.

What the bus costs is measured against it, and the share of the roofline on it.

`python -m loadtest.sampler_offline '{"engine": …, "model_dir": …, "device": …, "sequences": …, "batches": [[requests,
prompt, new], …], "repeats": …}'` prints the seconds of each batch, measured in turns: a list for each, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from transformers import AutoConfig

from services.sampler.engines.torch_engine import TorchSamplerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.sampling import SampleRequest, SamplingParams

Batch = tuple[int, int, int]
"""Requests, tokens of each prompt, new tokens of each."""
Generate = Callable[[list[list[int]], int], int]
"""Prompts and new tokens of each in, the number of tokens out."""


@dataclass(frozen=True)
class Offline:
    """What to measure."""

    engine: str
    model_dir: str
    device: str
    sequences: int
    """Generated at the same time."""
    batches: Sequence[Batch]
    repeats: int
    threads: int = 0


async def seconds_of(offline: Offline) -> list[list[float]]:
    """Run a measurement in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.sampler_offline", json.dumps(asdict(offline)), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the offline engine ended with exit code {process.returncode}")
    found: list[list[float]] = json.loads(output.splitlines()[-1])
    return found


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Draw prompts, the same ones each time."""
    draw = random.Random(0)
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def _measure(offline: Offline, generate: Generate) -> list[list[float]]:
    vocabulary = AutoConfig.from_pretrained(offline.model_dir).vocab_size
    found: list[list[float]] = [[] for _ in offline.batches]
    for turn in range(offline.repeats + 1):  # the first one warms up
        for seconds, (count, length, new) in zip(found, offline.batches, strict=True):
            given = prompts(count, length, vocabulary)
            began = time.perf_counter()
            made = generate(given, new)
            took = time.perf_counter() - began
            assert made == count * new, f"{made} tokens instead of {count * new}"
            if turn:
                seconds.append(took)
    return found


def _on_torch(offline: Offline) -> list[list[float]]:
    async def run() -> list[list[float]]:
        engine = TorchSamplerEngine(
            "measured",
            offline.model_dir,
            device=offline.device,
            max_sequences=offline.sequences,
            threads=offline.threads or None,
        )
        await engine.start()
        loop = asyncio.get_running_loop()

        async def all_of(given: list[list[int]], new: int) -> int:
            params = SamplingParams(max_tokens=new, stop=[])
            requests = [
                SampleRequest(request_id="", base_model="measured", prompt=Int32s(p), params=params) for p in given
            ]
            results = await asyncio.gather(*map(engine.generate, requests))
            return sum(len(result.sequences[0].tokens) for result in results)

        def generate(given: list[list[int]], new: int) -> int:
            return asyncio.run_coroutine_threadsafe(all_of(given, new), loop).result()

        try:
            return await asyncio.to_thread(_measure, offline, generate)
        finally:
            await engine.stop()

    return asyncio.run(run())


def _on_vllm(offline: Offline) -> list[list[float]]:
    vllm: Any = import_module("vllm")  # only where it is installed
    llm = vllm.LLM(model=offline.model_dir, max_num_seqs=offline.sequences, skip_tokenizer_init=True)

    def generate(given: list[list[int]], new: int) -> int:
        params = vllm.SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=0)
        out: list[Any] = llm.generate([{"prompt_token_ids": ids} for ids in given], params, use_tqdm=False)
        return sum(len(request.outputs[0].token_ids) for request in out)

    return _measure(offline, generate)


if __name__ == "__main__":
    wanted = Offline(**json.loads(sys.argv[1]))
    print(json.dumps(_on_vllm(wanted) if wanted.engine == "vllm" else _on_torch(wanted)))
