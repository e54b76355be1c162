"""The torch sampler with more requests than places, policies that come and go, and things that fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from services.sampler.engines import kv_cache
from services.sampler.engines.batching import Shape
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult
from shared.errors import TemporaryError, UserError
from tests.engines.sampler_tools import (
    PROMPTS,
    Start,
    ask,
    continued,
    eventually,
    together,
    tokens,
)
from tests.engines.tiny import CONTEXT


async def test_requests_that_do_not_fit_into_memory_together_take_turns(start: Start, reference: Any) -> None:
    # 2 layers, keys and values, 2 heads of 8 float32: 256 bytes a position
    engine = await start(cache_bytes=256 * 160)
    assert engine.limits.positions == 160
    results = await together(engine, [ask(prompt, temperature=0, max_tokens=20) for prompt in PROMPTS * 3])
    for prompt, result in zip(PROMPTS * 3, results, strict=True):
        assert tokens(result) == continued(reference, prompt, 20)


# Errors


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask([1], num_samples=8, max_tokens=40), "8 samples of up to 48 tokens are more than the 256 that fit"),
        (ask([1], stop=["x"]), "need a tokenizer"),
        (ask([1] * 9, max_tokens=0, topk_prompt_logprobs=128), "1152 log-probabilities .* more than the 1000"),
    ],
)
async def test_what_does_not_fit_this_engine_is_refused(
    start: Start, request_: SampleRequest, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sampler.engines.limits.MAX_CELLS", 1000)
    engine = await start(max_sequences=8, max_context=64, cache_bytes=256 * 256)
    with pytest.raises(UserError, match=message):
        await engine.generate(request_)


async def test_a_prompt_that_cannot_be_computed_fails_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start()
    forward = engine._alive().built.forward
    usual = forward.prefill

    def broken(ids: Tensor, *rest: Any) -> Tensor:
        if (ids == 200).any():
            raise ValueError("200 is cursed")
        return usual(ids, *rest)

    monkeypatch.setattr(forward, "prefill", broken)
    outcomes = await asyncio.gather(*(engine.generate(ask(p)) for p in PROMPTS), return_exceptions=True)
    assert [isinstance(outcome, SampleResult) for outcome in outcomes] == [True, True, True, True, False]
    assert "200 is cursed" in str(outcomes[4])


async def test_a_failed_step_fails_those_who_took_part_and_the_next_are_served(
    start: Start, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start(max_sequences=3)
    forward = engine._alive().built.forward
    usual = forward.decode

    def broken(*_: Any) -> Tensor:
        monkeypatch.setattr(forward, "decode", usual)
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    running = asyncio.create_task(engine.generate(ask(PROMPTS[0], num_samples=3, max_tokens=CONTEXT - 1)))
    await eventually(lambda: engine.load().running == 3)
    waiting = asyncio.create_task(engine.generate(ask(PROMPTS[3], temperature=0)))
    await eventually(lambda: engine.load().waiting == 1)
    monkeypatch.setattr(forward, "decode", broken)
    with pytest.raises(TemporaryError, match="ran out of memory while computing the next tokens: tried to allocate"):
        await running
    assert tokens(await waiting) == continued(reference, PROMPTS[3], 8)


async def test_memory_that_runs_out_while_the_cache_grows_leaves_it_usable(
    start: Start, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start(max_sequences=32)
    running = asyncio.create_task(engine.generate(ask(PROMPTS[3], temperature=0, max_tokens=40)))
    await eventually(lambda: engine.load().running == 1)
    usual, calls = kv_cache._zeros, iter(range(100))

    def scarce(like: Tensor, shape: Shape) -> Tensor:
        if next(calls) == 2:  # the first two of four tensors have grown
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return usual(like, shape)

    monkeypatch.setattr(kv_cache, "_zeros", scarce)
    with pytest.raises(TemporaryError, match="tried to allocate 1 TiB"):
        await engine.generate(ask(PROMPTS[2], num_samples=31))
    assert tokens(await running) == continued(reference, PROMPTS[3], 40)
    results = await together(engine, [ask(prompt, temperature=0, max_tokens=80) for prompt in PROMPTS])
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert tokens(result) == continued(reference, prompt, 80)


async def test_a_dead_worker_is_said_to_everybody_and_nobody_hangs(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start()

    def dies() -> None:
        raise SystemError("a defect")

    monkeypatch.setattr(engine._alive().built.generation, "decode", dies)
    async with asyncio.timeout(10):
        with pytest.raises(TemporaryError, match="worker has died"):
            await engine.generate(ask(PROMPTS[0]))
        with pytest.raises(TemporaryError, match="worker has died"):
            await engine.generate(ask(PROMPTS[0]))
        with pytest.raises(TemporaryError, match="worker has died"):
            await engine.load_policy(PolicyRef(run="run", version=0), {})


async def test_a_model_that_the_engine_would_compute_wrongly_is_refused(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "services.sampler.engines.forward.Forward.logits", lambda self, hidden, segments: self._head(hidden) * 1.01
    )
    with pytest.raises(UserError, match="logits differ by"):
        await start()
