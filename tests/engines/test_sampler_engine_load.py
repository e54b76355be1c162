"""The torch sampler with more requests than places, policies that come and go, and things that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.sampler.engines import kv_cache
from services.sampler.engines.batching import Shape
from shared.contracts.arrays import Int32s
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult
from shared.errors import PermanentError, TemporaryError, UserError
from shared.models.adapter_files import to_peft
from tests.engines.sampler_tools import (
    PROMPTS,
    Start,
    ask,
    continued,
    eventually,
    policy_files,
    together,
    tokens,
)
from tests.engines.tiny import CONTEXT, VOCABULARY


async def test_more_sequences_than_places_wait_and_finish(start: Start) -> None:
    engine = await start(max_sequences=4)
    seen: list[int] = []

    async def watch() -> None:
        while True:
            seen.append(engine.load().running)
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    asked = [ask(PROMPTS[at % 5], num_samples=1 + at % 4, max_tokens=10) for at in range(20)]
    results = await together(engine, asked)
    watcher.cancel()
    assert [len(result.sequences) for result in results] == [request.num_samples for request in asked]
    assert max(seen) <= 4
    assert results[-1].queue_seconds > 0
    assert results[-1].seconds > 0


async def test_a_short_request_overtakes_a_long_one_that_already_runs(start: Start, reference: Any) -> None:
    engine = await start()
    long = asyncio.create_task(engine.generate(ask(PROMPTS[0], max_tokens=CONTEXT - 1)))
    await eventually(lambda: engine.load().running == 1)
    short = await engine.generate(ask(PROMPTS[3], max_tokens=3, temperature=0))
    assert not long.done()
    assert tokens(short) == continued(reference, PROMPTS[3], 3)
    long.cancel()


async def test_requests_that_do_not_fit_into_memory_together_take_turns(start: Start, reference: Any) -> None:
    # 2 layers, keys and values, 2 heads of 8 float32: 256 bytes a position
    engine = await start(cache_bytes=256 * 160)
    assert engine.limits.positions == 160
    results = await together(engine, [ask(prompt, temperature=0, max_tokens=20) for prompt in PROMPTS * 3])
    for prompt, result in zip(PROMPTS * 3, results, strict=True):
        assert tokens(result) == continued(reference, prompt, 20)


async def test_cancelling_frees_the_place_for_those_who_wait(start: Start, reference: Any) -> None:
    engine = await start(max_sequences=3)
    endless = [asyncio.create_task(engine.generate(ask(PROMPTS[0], max_tokens=1000))) for _ in range(2)]
    waiting = asyncio.create_task(engine.generate(ask(PROMPTS[0], num_samples=3, max_tokens=1000)))
    await eventually(lambda: engine.load().running == 2 and engine.load().waiting == 3)
    later = asyncio.create_task(engine.generate(ask(PROMPTS[3], num_samples=2, temperature=0)))
    waiting.cancel()
    endless[0].cancel()
    result = await later
    assert result.sequences[0].tokens.tolist() == continued(reference, PROMPTS[3], 8)
    assert not endless[1].done()
    endless[1].cancel()
    await eventually(lambda: engine.load().running == engine.load().waiting == 0)
    assert [task.cancelled() for task in (*endless, waiting)] == [True, True, True]


async def test_a_policy_in_use_cannot_be_unloaded(start: Start, reference: Any) -> None:
    engine = await start()
    policy = PolicyRef(run="run", version=0)
    await engine.load_policy(policy, policy_files(reference, 0)[1])
    task = asyncio.create_task(engine.generate(ask(PROMPTS[0], policy=policy, max_tokens=CONTEXT - 1)))
    await eventually(lambda: engine.load().running == 1)
    with pytest.raises(TemporaryError, match="used by 1 request"):
        await engine.unload_policy(policy)
    assert engine.policies == {policy}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.unload_policy(policy)
    await engine.unload_policy(policy)
    assert engine.policies == frozenset()
    with pytest.raises(UserError, match="run@0 is not loaded"):
        await engine.generate(ask(PROMPTS[0], policy=policy))


async def test_policies_come_and_go_while_requests_run(start: Start, reference: Any) -> None:
    engine = await start(max_policies=2)
    first, second, third = (PolicyRef(run="run", version=version) for version in range(3))
    files = {policy: policy_files(reference, policy.version)[1] for policy in (first, second, third)}
    await engine.load_policy(first, files[first])
    stop = asyncio.Event()

    async def traffic() -> list[tuple[int, ...]]:
        answers = []
        while not stop.is_set():
            answers.append(tuple(tokens(await engine.generate(ask(PROMPTS[2], policy=first, temperature=0)))))
        return answers

    busy = [asyncio.create_task(traffic()) for _ in range(3)]
    await engine.load_policy(second, files[second])
    await engine.load_policy(second, files[second])
    with pytest.raises(TemporaryError, match="2 policies are loaded"):
        await engine.load_policy(third, files[third])
    before = tokens(await engine.generate(ask(PROMPTS[2], policy=second, temperature=0)))
    await engine.unload_policy(second)
    await engine.load_policy(third, files[third])
    after = tokens(await engine.generate(ask(PROMPTS[2], policy=third, temperature=0)))
    stop.set()
    answers = {answer for task in busy for answer in await task}
    assert engine.policies == {first, third}
    assert len(answers | {tuple(before), tuple(after)}) == 3
    assert len(answers) == 1


# Errors


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask([]), "the prompt is empty"),
        (ask([1, VOCABULARY]), f"token id {VOCABULARY} in the prompt is outside"),
        (ask([1, -1]), "token id -1 in the prompt is outside"),
        (ask([1] * 60, max_tokens=5), "a prompt of 60 tokens and max_tokens 5 are more than the context of 64"),
        (ask([1] * 64, max_tokens=None), "a prompt of 64 tokens leaves no room"),
        (ask([1], num_samples=9), "num_samples 9 is more than the 8 sequences"),
        (ask([1], num_samples=8, max_tokens=40), "8 samples of up to 48 tokens are more than the 256 that fit"),
        (ask([1], policy=PolicyRef(run="run", version=3)), "policy run@3 is not loaded"),
        (ask([1], top_k=0), "top_k 0"),
        (ask([1], stop=["x"]), "need a tokenizer"),
        (ask([1], stop=[""]), "a stop string is empty"),
        (SampleRequest(request_id="r", base_model="other", prompt=Int32s([1])), "base model 'other' is not served"),
    ],
)
async def test_a_request_that_cannot_be_answered_is_refused_in_words(
    start: Start, request_: SampleRequest, message: str
) -> None:
    engine = await start(max_sequences=8, max_context=64, cache_bytes=256 * 256)
    with pytest.raises(UserError, match=message):
        engine.check(request_)
    with pytest.raises(UserError, match=message):
        await engine.generate(request_)


async def test_files_that_do_not_fit_the_model_are_refused(start: Start) -> None:
    engine = await start()
    with pytest.raises(PermanentError):
        await engine.load_policy(PolicyRef(run="run", version=0), {"adapter_config.json": b"{}"})
    assert engine.policies == frozenset()


async def test_a_policy_that_overflows_fails_only_its_own_requests(start: Start, reference: Any) -> None:
    engine = await start(max_sequences=8)
    bad, good = PolicyRef(run="bad", version=0), PolicyRef(run="good", version=0)
    adapter, _ = policy_files(reference, 0)
    for _, b in adapter.weights.values():
        b.mul_(1e30)
    await engine.load_policy(bad, to_peft(adapter, "tiny"))
    await engine.load_policy(good, policy_files(reference, 1)[1])
    poison = ask(PROMPTS[2], policy=bad, temperature=0, max_tokens=30)
    short = ask(PROMPTS[0], policy=good, temperature=0, max_tokens=30)
    alone = await engine.generate(short)
    for _ in range(3):  # the places that the failed ones leave, longer than needed, are used by the others
        asked = [poison, short] * 4
        outcomes = await asyncio.gather(*(engine.generate(request) for request in asked), return_exceptions=True)
        for outcome in outcomes[::2]:
            assert isinstance(outcome, PermanentError)
            assert "policy bad@0 gives logits that are not finite" in str(outcome)
        for outcome in outcomes[1::2]:
            assert isinstance(outcome, SampleResult)
            assert tokens(outcome) == tokens(alone)


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


async def test_a_decoder_that_raises_fails_only_its_own_request(start: Start) -> None:
    def cursed(tokens: Sequence[int]) -> str:
        raise ValueError(f"cannot decode {len(tokens)} tokens")

    engine = await start(decode=cursed)
    failed, fine = await asyncio.gather(
        engine.generate(ask(PROMPTS[0], stop=["x"])), engine.generate(ask(PROMPTS[1])), return_exceptions=True
    )
    assert "cannot decode" in str(failed)
    assert isinstance(fine, SampleResult)


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


async def test_stopping_cancels_what_runs_and_what_waits(start: Start) -> None:
    engine = await start(max_sequences=1)
    tasks = [asyncio.create_task(engine.generate(ask(PROMPTS[0], max_tokens=1000))) for _ in range(2)]
    await eventually(lambda: engine.load().running == 1)
    await engine.stop()
    await engine.stop()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in tasks] == [True, True]
    with pytest.raises(TemporaryError, match="not running"):
        engine.check(ask(PROMPTS[0]))


async def test_a_model_that_is_not_there_is_a_users_error(start: Start, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        await start(tmp_path / "nowhere")


async def test_a_model_that_the_engine_would_compute_wrongly_is_refused(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "services.sampler.engines.forward.Forward.logits", lambda self, hidden, segments: self._head(hidden) * 1.01
    )
    with pytest.raises(UserError, match="logits differ by"):
        await start()
