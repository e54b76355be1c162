"""What trainers and samplers tell of what was used: once, for whom, of what."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Int32s
from shared.contracts.sampling import SampleRequest, SamplingParams
from shared.contracts.tenants import UsageRecorded
from shared.contracts.training import Datum, ForwardBackward, LossSpec, RunRecord, SavePolicy
from shared.errors import TemporaryError, UserError
from shared.usage import Usage
from tests.mesh.harness import MODEL, Place
from tests.mesh.producer import LORA, Producer
from tests.mesh.test_trainer_files import take_over


async def told(bus: Bus) -> list[UsageRecorded]:
    """All records on the stream."""
    last = await bus.last_place(topology.USED)
    found: list[UsageRecorded] = []
    if last:
        async for delivery in bus.follow(topology.USED):
            found.append(delivery.message)
            if delivery.seq == last:
                break
    return found


def sums(records: list[UsageRecorded]) -> Counter[tuple[str, str, str]]:
    total: Counter[tuple[str, str, str]] = Counter()
    for record in records:
        assert record.base_model == MODEL
        total[record.owner, record.session, record.kind] += record.tokens
    return total


def data(count: int) -> list[Datum]:
    return [Datum(tokens=Int32s([5, 6, 7, 8]), targets=Int32s([6, 7, 8, 9])) for _ in range(count)]


class Client(Producer):
    """A producer whose run belongs to a session."""

    async def record(self) -> None:
        record = RunRecord(run=self.run, base_model=MODEL, lora=LORA, owner=self.owner, session="s-1")
        await self.bus.table(topology.RUNS).create(self.run, record)


async def test_training_is_counted_once_however_it_is_cut_and_whoever_replays_it(place: Place, bus: Bus) -> None:
    producer = Client(bus, "s-1:train:0", owner="ann")
    loss = LossSpec(name="cross_entropy")
    async with place.trainer(replica="one", max_pass_tokens=8) as (service, _):
        await producer.create()
        await producer.send(producer.make(ForwardBackward, data=data(10), loss=loss))
        await producer.send(producer.make(ForwardBackward, data=data(1), loss=loss, forward_only=True))
        with pytest.raises(UserError, match="99999"):
            await producer.send(producer.train([5, 99999, 7]))
        await producer.send(producer.step())
        for held in service._held.values():
            held.done_since_snapshot = 0  # it dies without writing anything down
        await take_over(bus, producer.run)
    assert sums(await told(bus)) == {("ann", "s-1", "training"): 44}
    async with place.trainer(replica="two"):
        await producer.send(producer.make(ForwardBackward, data=data(2), loss=loss))
    assert sums(await told(bus)) == {("ann", "s-1", "training"): 52}


async def test_prompts_and_samples_are_counted_for_whoever_asked(place: Place, bus: Bus) -> None:
    async with place.trainer(), place.sampler():
        producer = Producer(bus, "job-run")
        await producer.create()
        saved = await producer.send(producer.make(SavePolicy, version=1))
        assert saved.policy is not None
        for owner, session, policy in (("ann", "s-1", None), ("bob", "", saved.policy.policy)):
            request = SampleRequest(
                request_id=bus.new_request(),
                base_model=MODEL,
                prompt=Int32s([5, 6, 7]),
                params=SamplingParams(max_tokens=4, stop=[]),
                num_samples=2,
                policy=policy,
                owner=owner,
                session=session,
            )
            await bus.ask(topology.SAMPLES, request, timeout=30, pool=MODEL)
    assert sums(await told(bus)) == {
        ("ann", "s-1", "prompt"): 3,
        ("ann", "s-1", "sampled"): 8,
        ("bob", "", "prompt"): 3,
        ("bob", "", "sampled"): 8,
    }


async def test_a_record_lies_in_one_hour_and_what_could_not_be_told_is_told_later_once(bus: Bus) -> None:
    now = 7199.0
    usage = Usage(bus, MODEL, clock=lambda: now)
    usage.count("training", 5, owner="ann", session="")
    usage.count("training", 0, owner="idle", session="")
    now = 7199.5
    usage.count("training", 6, owner="ann", session="")
    now = 7200.5
    usage.count("training", 7, owner="ann", session="")
    publish = bus.publish
    stored = 0

    async def losing_the_answer(*arguments: object, **named: object) -> int:
        nonlocal stored
        place = await publish(*arguments, **named)  # type: ignore[arg-type]
        stored += 1
        raise TemporaryError(f"the answer that it is at {place} was lost")

    bus.publish = losing_the_answer  # type: ignore[method-assign]
    with pytest.raises(TemporaryError):
        await usage.tell()
    bus.publish = publish  # type: ignore[method-assign]
    assert stored == 1
    await asyncio.gather(usage.tell())
    await usage.stop()
    records = await told(bus)
    assert [(record.tokens, record.begin, record.end) for record in records] == [
        (11, 7199.0, 7199.5),
        (7, 7200.5, 7200.5),
    ]
