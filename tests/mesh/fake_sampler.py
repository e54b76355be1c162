"""A sampler that says what a test has written down, over a real bus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from shared import topology
from shared.bus import Bus, Delivery
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.sampling import SampledSequence, SampleRequest, SampleResult
from shared.worker import Worker, WorkerMetrics

IM_END = 257
"""End of a turn in the tokenizer of `tests.engines.tiny`, whose other ids are bytes."""
Script = Callable[[str, int], str | bytes | None]


class FakeSampler:
    """Answers the requests to one pool from a script; used with `async with`.

    `script(prompt, i)` gives what sample i replies to a prompt (as text, special tokens left out), or raises what the
    request shall be refused with, or gives None for no answer ever. A text is ended by the end-of-turn token; bytes are
    cut off by the length. Token t has the log-probability `-(t % 7) / 8`, and under the base model (that is, in
    `prompt_logprobs`) `-(t % 5) / 8`.
    All requests are kept in `requests`.
    """

    def __init__(self, bus: Bus, script: Script, base_model: str = "tiny") -> None:
        self.requests: list[SampleRequest] = []
        self._bus = bus
        self._script = script
        self._worker = Worker(
            bus,
            topology.sampler_consumer(base_model),
            self._handle,
            concurrency=32,
            metrics=WorkerMetrics(CollectorRegistry()),
        )

    async def __aenter__(self) -> FakeSampler:
        self._running = asyncio.create_task(self._worker.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._worker.stop(1)
        await self._running

    async def _handle(self, delivery: Delivery[SampleRequest]) -> None:
        request = delivery.message
        self.requests.append(request)
        prompt = text_of(request.prompt)
        scoring = request.params.max_tokens == 0
        replies = [b"" if scoring else self._script(prompt, number) for number in range(request.num_samples)]
        if None in replies:
            return
        result = SampleResult(
            request_id=request.request_id,
            sequences=[sequence(reply) for reply in replies if reply is not None],
            prompt_logprobs=reference(request.prompt) if request.prompt_logprobs else None,
            policy=request.policy,
        )
        await self._bus.answer(result)


def text_of(tokens: Int32s) -> str:
    """Text of the tiny tokenizer's ids, special tokens left out."""
    return bytes(token for token in tokens if token < 256).decode()


def sequence(reply: str | bytes) -> SampledSequence:
    """A reply as a sampler gives it."""
    tokens = list(reply) if isinstance(reply, bytes) else [*reply.encode(), IM_END]
    return SampledSequence(
        tokens=Int32s(tokens),
        logprobs=Float32s(-(token % 7) / 8 for token in tokens),
        stop_reason="length" if isinstance(reply, bytes) else "stop",
    )


def reference(prompt: Int32s) -> Float32s:
    """Log-probabilities under the base model, the first unknown."""
    return Float32s([float("nan"), *(-(token % 5) / 8 for token in prompt[1:])])
