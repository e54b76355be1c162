"""A sampler over the bus: requests that are given up, and policies under way."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from services.sampler.engines.base import EngineLoad
from services.sampler.service import SamplerService
from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Int32s
from shared.contracts.policies import PolicyRecord, PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult, SamplingParams
from shared.contracts.training import SavePolicy
from shared.errors import PermanentError, TemporaryError, UserError
from tests.mesh.harness import MODEL, Place, eventually
from tests.mesh.producer import Producer

LONG = SamplingParams(max_tokens=1000, stop=[])
SHORT = SamplingParams(max_tokens=4, temperature=0.0, stop=[])


def asking(bus: Bus, params: SamplingParams, *, policy: PolicyRef | None = None, samples: int = 1) -> SampleRequest:
    return SampleRequest(
        request_id=bus.new_request(), base_model=MODEL, prompt=Int32s([5, 6]), params=params, policy=policy,
        num_samples=samples,
    )  # fmt: skip


async def sample(bus: Bus, policy: PolicyRef | None = None, params: SamplingParams = SHORT) -> SampleResult:
    result = await bus.ask(topology.SAMPLES, asking(bus, params, policy=policy), timeout=30, pool=MODEL)
    assert isinstance(result, SampleResult)
    return result


def load(service: SamplerService) -> EngineLoad:
    return service._engine.load()


async def publish(producer: Producer, version: int) -> PolicyRecord:
    saved = await producer.send(producer.make(SavePolicy, version=version))
    assert saved.policy is not None
    return saved.policy


async def idle(service: SamplerService) -> None:
    async def look() -> bool | None:
        return True if not load(service).running and not load(service).waiting else None

    await eventually(look)


# Requests that nobody waits for


async def test_whoever_is_cancelled_or_out_of_patience_frees_the_places_of_its_request(place: Place, bus: Bus) -> None:
    async with place.sampler(max_sequences=8) as (service, _):

        async def running() -> bool | None:
            return load(service).running == 8 or None

        task = asyncio.create_task(bus.ask(topology.SAMPLES, asking(bus, LONG, samples=8), pool=MODEL))
        await eventually(running)
        task.cancel()
        await idle(service)
        with pytest.raises(TemporaryError, match="no answer"):
            await bus.ask(topology.SAMPLES, asking(bus, LONG, samples=8), timeout=0.3, pool=MODEL)
        await idle(service)
        assert load(service).sampled_tokens < 2 * 8 * 1000, "neither was generated to its end"
        assert (await sample(bus)).sequences[0].tokens


async def test_a_request_given_up_in_the_queue_is_never_begun_and_answered_so(place: Place, bus: Bus) -> None:
    async with place.sampler(max_requests=1) as (service, _):
        first = asyncio.create_task(bus.ask(topology.SAMPLES, asking(bus, LONG), pool=MODEL))

        async def running() -> bool | None:
            return load(service).running == 1 or None

        await eventually(running)
        queued = asking(bus, LONG, samples=100)
        second = asyncio.create_task(bus.ask(topology.SAMPLES, queued, pool=MODEL))

        async def stored() -> bool | None:
            state = (await bus.stream_context.stream_info(topology.SAMPLE.name)).state
            return state.messages == 2 or None

        await eventually(stored)
        second.cancel()
        await first
        answer = await eventually(lambda: bus.answer_of(queued.request_id))
        assert "abandoned by whoever asked" in str(answer)
        assert load(service).sampled_tokens <= 1000
        letters = await bus.last_place(topology.DEAD_LETTERS)
        assert letters == 0, "nothing is wrong with it"


async def test_a_sampler_that_stops_hands_a_request_back_and_does_not_give_it_up(place: Place, bus: Bus) -> None:
    place.common["drain_seconds"] = 0.0
    async with place.sampler() as (service, _):

        async def running() -> bool | None:
            return load(service).running == 1 or None

        task = asyncio.create_task(bus.ask(topology.SAMPLES, asking(bus, LONG), pool=MODEL))
        await eventually(running)
    async with place.sampler(replica="sampler-2"):
        result = await task
    assert isinstance(result, SampleResult)
    assert len(result.sequences[0].tokens) == 1000


# Policies


async def test_an_announced_policy_is_there_before_anybody_asks_and_while_others_are_served(
    place: Place, bus: Bus
) -> None:
    async with place.trainer(), place.sampler() as (service, _):
        producer = Producer(bus, "run-1")
        await producer.create()
        first = await publish(producer, 1)
        long = asyncio.create_task(sample(bus, first.policy, LONG))
        await producer.learn([5, 6, 7, 8, 9], steps=5)
        second = await publish(producer, 2)

        async def loaded() -> bool | None:
            return second.policy in service._engine.policies or None

        await eventually(loaded)
        newer = await sample(bus, second.policy)
        assert newer.policy == second.policy
        older = await long
        assert older.policy == first.policy, "what runs keeps its version"
        again = await sample(bus, first.policy)
        assert again.sequences != newer.sequences


async def test_an_evicted_policy_comes_back_and_gives_the_same_again(place: Place, bus: Bus) -> None:
    async with place.trainer(), place.sampler(max_policies=1):
        producer = Producer(bus, "run-1")
        await producer.create()
        records = []
        for version in (1, 2):
            await producer.learn([5, 6, 7, 8, version], steps=10)
            records.append(await publish(producer, version))
        before = [await sample(bus, record.policy) for record in records]
        again = await asyncio.gather(*(sample(bus, record.policy) for record in records * 4))
        for expected, found in zip(before * 4, again, strict=True):
            assert (found.policy, found.sequences[0].tokens) == (expected.policy, expected.sequences[0].tokens)
        assert before[0].sequences != before[1].sequences


@pytest.mark.parametrize("damage", ["missing", "corrupted", "deleted"])
async def test_a_damaged_policy_is_an_error_and_not_another_version(place: Place, bus: Bus, damage: str) -> None:
    async with place.trainer():
        producer = Producer(bus, "run-1")
        await producer.create()
        good, bad = await publish(producer, 1), await publish(producer, 2)
    path = place.directory / "blobs" / bad.weights.key
    if damage == "missing":
        path.unlink()
    elif damage == "corrupted":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        await bus.table(topology.POLICIES).delete(("run-1", "2"))
    error, words = {
        "missing": (PermanentError, "is missing from"),
        "corrupted": (PermanentError, "checksum differs"),
        "deleted": (UserError, "run-1@2 does not exist"),
    }[damage]
    async with place.sampler():
        for _ in range(2):
            with pytest.raises(error, match=words):
                await sample(bus, bad.policy)
        assert (await sample(bus, good.policy)).policy == good.policy


async def test_a_policy_of_another_model_is_refused(place: Place, bus: Bus) -> None:
    async with place.trainer(), place.sampler():
        producer = Producer(bus, "run-1")
        await producer.create()
        record = await publish(producer, 1)
        foreign = PolicyRecord(
            policy=PolicyRef(run="foreign", version=1), base_model="other", lora=record.lora, config=record.config,
            weights=record.weights,
        )  # fmt: skip
        await bus.table(topology.POLICIES).create(("foreign", "1"), foreign)
        with pytest.raises(UserError, match="foreign@1 belongs to other"):
            await sample(bus, foreign.policy)


async def test_two_tenants_that_alternate_over_one_place_do_not_thrash(place: Place, bus: Bus) -> None:
    async with place.trainer():
        records = []
        for run in ("run-1", "run-2"):
            producer = Producer(bus, run, owner=run)
            await producer.create()
            records.append(await publish(producer, 1))
    asked = [
        asyncio.create_task(bus.ask(topology.SAMPLES, asking(bus, SHORT, policy=record.policy), timeout=60, pool=MODEL))
        for record in records * 30
    ]

    async def stored() -> bool | None:
        return (await bus.stream_context.stream_info(topology.SAMPLE.name)).state.messages == 60 or None

    await eventually(stored)
    async with place.sampler(max_policies=1) as (_, node):
        results = await asyncio.gather(*asked)
        loads = node.telemetry.registry.get_sample_value("openrl_sampler_policy_load_seconds_count")
    for number, result in enumerate(results):
        assert isinstance(result, SampleResult)
        assert result.policy == records[number % 2].policy
    assert loads is not None
    assert 2 <= loads <= 4, "one after the other would load 60 times"


# Requests that cannot be answered


async def test_what_cannot_be_answered_fails_alone(place: Place, bus: Bus) -> None:
    good = asking(bus, SHORT)
    wrong: dict[str, dict[str, Any]] = {
        "tokens": {"prompt": Int32s([5] * 5000)},
        "vocabulary": {"prompt": Int32s([5, 10**6])},
        "other-model": {"base_model": "other-model"},
        "num_samples": {"num_samples": 10**9},
        "temperature": {"params": SamplingParams(max_tokens=4, temperature=1e-320, stop=[5, 10**12])},
        "does not exist": {"policy": PolicyRef(run="nobody", version=10**15)},
    }
    requests = [msgspec.structs.replace(good, request_id=bus.new_request(), **changes) for changes in wrong.values()]
    async with place.sampler():
        answers = await asyncio.gather(
            *(
                bus.ask(topology.SAMPLES, request, timeout=30, pool=MODEL)
                for request in [asking(bus, SHORT), *requests, asking(bus, SHORT)]
            ),
            return_exceptions=True,
        )
    first, *refused, last = answers
    for words, error in zip(wrong, refused, strict=True):
        assert isinstance(error, UserError), (words, error)
        assert words in str(error) or words in ("temperature", "num_samples"), str(error)
    assert isinstance(first, SampleResult)
    assert isinstance(last, SampleResult)
    assert first.sequences[0].tokens == last.sequences[0].tokens
