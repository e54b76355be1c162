"""What the tests of sampler engines share: engines on a tiny model, requests, and references to compare with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from services.sampler.engines.base import SamplerEngine
from services.sampler.engines.torch_engine import TorchSamplerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec, PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult, SamplingParams
from shared.models.adapter_files import to_peft
from shared.models.lora import Adapter

Start = Callable[..., Awaitable[TorchSamplerEngine]]
StartAny = Callable[..., Awaitable[SamplerEngine]]
"""Starts an engine of any kind on the tiny model, with the settings that engines share, named as the torch engine's."""
_PARAMS = frozenset(field.name for field in msgspec.structs.fields(SamplingParams))
PROMPTS = [[5], [72, 101, 108, 108, 111], list(range(40, 75)), [3, 1, 4, 1, 5, 9, 2, 6], [200] * 21]


@dataclass(frozen=True)
class Prefill:
    """What an engine computes of prompts that it has computed already. It keeps them in blocks of so many tokens."""

    block: int | None = None
    """None: it keeps a prompt for the samples of its own request, whole."""

    def again(self, length: int) -> int:
        """Tokens that each further sample computes: those of the last block, since what comes last is never kept."""
        return 0 if self.block is None else (length - 1) % self.block + 1

    def reused(self, lengths: Iterable[int]) -> int:
        """Tokens of prompts that may have been kept from other requests."""
        return 0 if self.block is None else sum(length - self.again(length) for length in lengths)


def decode(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def ask(prompt: Sequence[int], *, policy: PolicyRef | None = None, **settings: Any) -> SampleRequest:
    """Make a request; settings of `SampleRequest` go there and the others to `SamplingParams`."""
    own = {name: settings.pop(name) for name in list(settings) if name not in _PARAMS}
    params = SamplingParams(**{"stop": [], "max_tokens": 8, **settings})
    return SampleRequest(
        **{"request_id": "request", "base_model": "tiny", "prompt": Int32s(prompt), "policy": policy, **own},
        params=params,
    )


async def together(engine: SamplerEngine, requests: Sequence[SampleRequest]) -> list[SampleResult]:
    return await asyncio.gather(*(engine.generate(request) for request in requests))


def tokens(result: SampleResult) -> list[int]:
    assert len(result.sequences) == 1
    return result.sequences[0].tokens.tolist()


@torch.no_grad()
def continued(model: Any, prompt: Sequence[int], count: int, **settings: Any) -> list[int]:
    """Transformers' own greedy continuation of one prompt."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
        **{"eos_token_id": None, "pad_token_id": 0, **settings},
    )  # fmt: skip
    continuation: list[int] = out[0, len(prompt) :].tolist()
    return continuation


@torch.no_grad()
def logprobs_of(model: Any, prompt: Sequence[int], sampled: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of sampled tokens by one plain forward pass over everything."""
    logits = model(torch.tensor([[*prompt, *sampled]])).logits[0, len(prompt) - 1 : -1].float()
    found: Tensor = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(sampled)[:, None])[:, 0]
    return found


def policy_files(model: Any, seed: int, **spec: Any) -> tuple[Adapter, dict[str, bytes]]:
    """Make an adapter whose B is not zero, so that it changes what the model says."""
    adapter = Adapter.fresh(model, LoraSpec(**{"rank": 4, "seed": seed, **spec}))
    generator = torch.Generator().manual_seed(seed)
    for _, b in adapter.weights.values():
        b.normal_(generator=generator).mul_(0.1)
    return adapter, to_peft(adapter, "tiny")


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
