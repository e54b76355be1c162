"""Trainer and sampler over the bus: operations in order, policies that are immutable, recovery by snapshot and log."""

from __future__ import annotations

import asyncio

import pytest

from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult, SamplingParams
from shared.contracts.training import (
    SavePolicy,
    SaveState,
)
from shared.errors import UserError
from tests.mesh.harness import MODEL, Place
from tests.mesh.producer import Producer


async def sample(bus: Bus, policy: PolicyRef | None, prompt: list[int]) -> SampleResult:
    request = SampleRequest(
        request_id=bus.new_request(),
        base_model=MODEL,
        prompt=Int32s(prompt),
        params=SamplingParams(max_tokens=4, temperature=0.0, stop=[]),
        policy=policy,
    )
    result = await bus.ask(topology.SAMPLES, request, timeout=30, pool=MODEL)
    assert isinstance(result, SampleResult)
    return result


async def test_operations_sent_all_at_once_in_any_order_are_done_in_seq_order(place: Place, bus: Bus) -> None:
    async with place.trainer():
        producer = Producer(bus, "session:train:0")
        await producer.create()
        operations = [producer.train([5, 6, 7]), producer.step(), producer.train([5, 6, 7]), producer.step()]
        results = await asyncio.gather(*(producer.send(operation) for operation in reversed(operations)))
        losses = [result.metrics["loss:sum"] for result in reversed(results) if "loss:sum" in result.metrics]
        assert losses[1] < losses[0], "the first step came between the two passes"


async def test_a_policy_is_sampled_as_it_was_when_it_was_saved(place: Place, bus: Bus) -> None:
    async with place.trainer(), place.sampler():
        producer = Producer(bus, "run-1")
        await producer.create()
        await producer.learn([5, 6, 7, 8, 9], steps=30)
        first = (await producer.send(producer.make(SavePolicy, version=1))).policy
        assert first is not None
        at_once = await sample(bus, first.policy, [5, 6])
        assert list(at_once.sequences[0].tokens)[:3] == [7, 8, 9]
        await producer.learn([5, 6, 4, 3, 2], steps=30)
        second = (await producer.send(producer.make(SavePolicy, version=2))).policy
        assert second is not None
        old, new = await asyncio.gather(*(sample(bus, record.policy, [5, 6]) for record in (first, second)))
        assert old.sequences == at_once.sequences
        assert new.sequences != old.sequences


async def test_a_bad_operation_fails_alone_and_uses_up_its_seq(place: Place, bus: Bus) -> None:
    async with place.trainer():
        producer = Producer(bus, "run-1")
        await producer.create()
        good = await producer.send(producer.train([5, 6, 7], forward_only=True))
        with pytest.raises(UserError, match="99999"):
            await producer.send(producer.train([5, 99999, 7]))
        again = await producer.send(producer.train([5, 6, 7], forward_only=True))
        assert good.metrics["loss:sum"] == again.metrics["loss:sum"]


async def test_a_trainer_that_takes_over_comes_to_the_same_weights(place: Place, bus: Bus) -> None:
    undisturbed, disturbed = Producer(bus, "undisturbed"), Producer(bus, "disturbed")
    async with place.trainer(snapshot_operations=3):
        await undisturbed.create()
        await disturbed.create()
        for producer in (undisturbed, disturbed):
            for _ in range(2):
                await producer.send(producer.train([5, 6, 7, 8]))
                await producer.send(producer.step())
        await undisturbed.send(undisturbed.train([9, 8, 7]))
        await disturbed.send(disturbed.train([9, 8, 7]))  # a gradient that no step has used yet
        for _ in range(2):
            await undisturbed.send(undisturbed.step())
            await undisturbed.send(undisturbed.train([5, 6, 7, 8]))
    async with place.trainer(replica="trainer-2"):
        for _ in range(2):
            await disturbed.send(disturbed.step())
            await disturbed.send(disturbed.train([5, 6, 7, 8]))
        losses = [
            (await producer.send(producer.train([5, 6, 7, 8], forward_only=True))).logprobs[0]
            for producer in (undisturbed, disturbed)
        ]
        assert list(losses[0]) == pytest.approx(list(losses[1]), rel=1e-6)


async def test_an_operation_that_was_done_before_is_answered_and_not_done_again(place: Place, bus: Bus) -> None:
    async with place.trainer():
        producer = Producer(bus, "run-1")
        await producer.create()
        await producer.send(producer.train([5, 6, 7]))
        await producer.send(producer.step())
        before = await producer.send(producer.train([5, 6, 7], forward_only=True))
        await producer.send(producer.train([5, 6, 7]))  # a gradient, so that a step done again would show
        producer.seq -= 1
        late = producer.step()  # the seq of the pass before, with a new id, as after a long absence
        await bus.ask(topology.OPERATIONS, late, msg_id="late", timeout=30, run=producer.run)
        after = await producer.send(producer.train([5, 6, 7], forward_only=True))
        assert before.metrics["loss:sum"] == after.metrics["loss:sum"]


async def test_a_checkpoint_and_a_snapshot_are_in_the_blob_store(place: Place, bus: Bus) -> None:
    async with place.trainer():
        producer = Producer(bus, "run-1")
        await producer.create()
        result = await producer.send(producer.make(SaveState, name="final"))
        assert result.checkpoint is not None
        assert (place.directory / "blobs" / result.checkpoint.key).stat().st_size == result.checkpoint.size
    record = await bus.table(topology.RUNS).get("run-1")
    assert record is not None
    assert record.value.snapshot is not None, "a trainer that stops writes down what it holds"
    assert record.value.snapshot.seq == 1


@pytest.mark.parametrize(
    ("policy", "prompt", "complaint"),
    [
        (PolicyRef(run="nobody", version=1), [5, 6], "nobody@1 does not exist"),
        (None, [5, 99999], "99999"),
        (None, [5] * 100_000, "context"),
        (None, [], "empty"),
    ],
)
async def test_a_sample_request_that_cannot_be_answered_says_why(
    place: Place, bus: Bus, policy: PolicyRef | None, prompt: list[int], complaint: str
) -> None:
    async with place.sampler():
        with pytest.raises(UserError, match=complaint):
            await sample(bus, policy, prompt)
        assert (await sample(bus, None, [5, 6])).sequences[0].tokens, "the sampler goes on"


async def test_more_policies_than_places_are_all_served(place: Place, bus: Bus) -> None:
    async with place.trainer(), place.sampler(max_policies=2):
        producer = Producer(bus, "run-1")
        await producer.create()
        policies = []
        for version in range(1, 5):
            result = await producer.send(producer.make(SavePolicy, version=version))
            assert result.policy is not None
            policies.append(result.policy.policy)
        results = await asyncio.gather(*(sample(bus, policy, [5, 6]) for policy in policies * 3))
        assert [result.policy for result in results] == policies * 3


async def test_logprobs_of_trainer_and_sampler_agree(place: Place, bus: Bus) -> None:
    async with place.trainer(), place.sampler():
        producer = Producer(bus, "run-1")
        await producer.create()
        for _ in range(3):
            await producer.send(producer.train([5, 6, 7, 8, 9]))
            await producer.send(producer.step())
        saved = await producer.send(producer.make(SavePolicy, version=1))
        assert saved.policy is not None
        result = await sample(bus, saved.policy.policy, [5, 6])
        sequence = result.sequences[0]
        tokens = [5, 6, *sequence.tokens]
        scored = await producer.send(producer.train(tokens, forward_only=True))
        assert list(scored.logprobs[0])[1:] == pytest.approx(list(Float32s(sequence.logprobs)), abs=1e-4)
