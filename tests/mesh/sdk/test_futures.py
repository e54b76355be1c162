"""Futures: the same result whichever way one waits for it."""

from __future__ import annotations

import asyncio
import concurrent.futures

import pytest
import tinker
from tinker import types

from tests.mesh.sdk.data import datum, prompt
from tests.mesh.sdk.declared import DEPRECATED_TOO, means
from tests.mesh.sdk.world import SECONDS, User

pytestmark = DEPRECATED_TOO


@means(
    "blocking, awaited, as a coroutine and as a `concurrent.futures.Future`: one result, however often and in whatever "
    "order it is asked for; failures are raised each time",
    "APIFuture.result",
    "APIFuture.result_async",
    "APIFuture.coroutine",
    "APIFuture.future",
)
def test_every_way_to_wait_gives_the_same(user: User) -> None:
    training, sampler = user.train(), user.base()
    passed = training.forward([datum()], "cross_entropy")
    drawn = sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=4, stop=[]))
    failed = training.forward([datum([5, 999_999])], "cross_entropy")

    async def awaited() -> None:
        first = await passed
        assert await passed.result_async() == first
        assert await passed.coroutine() == first
        assert await passed.result_async(timeout=SECONDS) == first
        assert await asyncio.wrap_future(passed.future()) == first
        assert (await drawn.result_async()).sequences[0].tokens == (await drawn).sequences[0].tokens
        for _ in range(2):
            with pytest.raises(tinker.RequestFailedError):
                await failed

    asyncio.run(awaited())
    assert passed.result(SECONDS).metrics == passed.future().result().metrics
    assert isinstance(drawn.future(), concurrent.futures.Future)
    with pytest.raises(tinker.RequestFailedError, match="999999"):
        failed.result()


@means("results come to whoever asked for them, many at a time and in any order", "APIFuture.result")
def test_many_at_a_time(user: User) -> None:
    sampler = user.base()
    params = types.SamplingParams(max_tokens=1, temperature=0.0, stop=[])
    prompts = [[number, number + 1] for number in range(1, 101)]
    futures = [sampler.sample(prompt(each), 1, params, include_prompt_logprobs=True) for each in prompts]
    backwards = {number: futures[number].result(SECONDS) for number in reversed(range(100))}
    again = [sampler.sample(prompt(each), 1, params).result(SECONDS) for each in prompts[:5]]
    assert [backwards[number].sequences[0].tokens for number in range(5)] == [
        each.sequences[0].tokens for each in again
    ]
    assert len({each.sequences[0].sequence_id for each in backwards.values()}) == 100
