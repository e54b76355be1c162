"""Throughput of samplers: what the bus costs, what mixing policies costs, how near decoding is to the roofline."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loadtest.mesh import Mesh, mesh
from loadtest.sampler_models import adapter_files, publish_policy
from loadtest.sampler_offline import Offline, prompts, seconds_of
from loadtest.sampler_rows import Row
from loadtest.sampler_sync import MODEL, sample
from loadtest.shapes import PEAK_BYTES, SHAPES
from services.local.config import Setting
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SamplingParams


@dataclass(frozen=True)
class Crowd:
    """Requests that are made at the same time."""

    requests: int
    prompt: int
    new: int
    sequences: int
    """Generated at the same time; the others wait."""

    @property
    def tokens(self) -> int:
        """New ones, of all together."""
        return self.requests * self.new

    def settings(self) -> dict[str, Setting]:
        """What a sampler must be told to be able to take all of it."""
        return {"max_sequences": self.sequences, "max_requests": 2 * self.requests}


async def over_the_bus(
    directory: Path, sampler: Mapping[str, Setting], offline: Offline, crowd: Crowd, vocabulary: int
) -> Row:
    """Measure a crowd through the bus, and before and after that on the engine alone: they share one device."""
    (before,) = await seconds_of(offline)
    async with mesh(directory) as ours, ours.process("sampler", "sampler", _with(sampler, crowd)):
        seconds = [await _crowd(ours, crowd, vocabulary, [None]) for _ in range(offline.repeats + 1)][1:]
    (after,) = await seconds_of(offline)
    bus, engine = statistics.median(seconds), statistics.median(before + after)
    return Row(
        f"bus-{crowd.requests}x{crowd.prompt}+{crowd.new}",
        {"tok/s": crowd.tokens / bus, "offline tok/s": crowd.tokens / engine, "of offline": engine / bus},
        {"of offline": 0.95},
    )


async def mixed(
    directory: Path, sampler: Mapping[str, Setting], crowd: Crowd, vocabulary: int, policies: int, repeats: int
) -> Row:
    """Measure a crowd of one policy, and one of several mixed, in turns on the same sampler."""
    model_dir = str(sampler["model_dir"])
    async with mesh(directory) as ours, ours.process("sampler", "sampler", _with(sampler, crowd)):
        refs = [
            await publish_policy(ours.bus, MODEL, f"run-{number}", adapter_files(model_dir, number))
            for number in range(policies)
        ]
        turns = [
            (await _crowd(ours, crowd, vocabulary, refs[:1]), await _crowd(ours, crowd, vocabulary, refs))
            for _ in range(repeats + 1)
        ][1:]
    one = statistics.median(first for first, _ in turns)
    many = statistics.median(second for _, second in turns)
    return Row(
        f"mixed-{policies}-of-{crowd.requests}x{crowd.prompt}+{crowd.new}",
        {"tok/s": crowd.tokens / many, "one policy tok/s": crowd.tokens / one, "of one": one / many},
        {"of one": 0.95},
    )


async def roofline(shape: str, offline: Offline) -> Row:
    """Measure decoding on the engine alone: a batch with all its tokens less the same batch with one token each."""
    (requests, prompt, new), (_, _, one) = offline.batches
    whole, first = (statistics.median(seconds) for seconds in await seconds_of(offline))
    steps = new - one
    step = (whole - first) / steps
    size = 2 if offline.device.startswith("cuda") else 4
    moved = SHAPES[shape].decode_bytes(requests, prompt + (one + new) / 2, size)
    figures = {"decode tok/s": requests / step, "step ms": 1e3 * step, "GB a step": moved / 1e9}
    peak, what = bandwidth(offline.device)
    return Row(
        f"roofline-{shape}-{requests}x{prompt}+{new}", figures | {"of roofline": moved / step / peak}, notes=what
    )


def bandwidth(device: str) -> tuple[float, str]:
    """Return bytes a second from memory, and where the number is from: the data sheet, or reading 1 GiB here."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        peak = next((found for part, found in PEAK_BYTES.items() if part in name), 0.0)
        return (peak, f"of {peak / 1e12:.2f} TB/s") if peak else (float("nan"), f"bandwidth of {name} unknown")
    data = torch.ones(1 << 28)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began)
    peak = data.nbytes / min(seconds)
    return peak, f"of {peak / 1e9:.1f} GB/s, measured by reading"


def _with(sampler: Mapping[str, Setting], crowd: Crowd) -> dict[str, Setting]:
    return {"base_model": MODEL, **sampler, **crowd.settings()}


async def _crowd(ours: Mesh, crowd: Crowd, vocabulary: int, policies: Sequence[PolicyRef | None]) -> float:
    """Ask for everything at once, the policies in turn; return the seconds until the last answer is here."""
    given = prompts(crowd.requests, crowd.prompt, vocabulary)
    params = SamplingParams(max_tokens=crowd.new, stop=[])
    began = time.perf_counter()
    results = await asyncio.gather(
        *(
            sample(ours.bus, prompt, params, policies[number % len(policies)], "crowd")
            for number, prompt in enumerate(given)
        )
    )
    took = time.perf_counter() - began
    assert sum(len(result.sequences[0].tokens) for result in results) == crowd.tokens
    return took
