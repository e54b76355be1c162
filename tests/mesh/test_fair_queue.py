"""A pool's queue is shared by owners, however many requests each has in it. Orders are counted, nothing is timed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry

from shared import topology
from shared.bus import Bus, Delivery
from shared.contracts.arrays import Int32s
from shared.contracts.sampling import SampleRequest, SampleResult
from shared.queues import Lines
from shared.worker import Worker, WorkerMetrics
from tests.mesh.harness import eventually

POOL = "tiny"
BACKLOG = 3000


class Replica:
    """Takes requests, notes whose they are, and works on each until it is told to end one."""

    def __init__(self, bus: Bus, concurrency: int) -> None:
        self.begun: list[str] = []
        self.open = False
        """Requests end at once."""
        self._gates: list[asyncio.Event] = []
        self._bus = bus
        self.worker = Worker(
            bus,
            topology.sampler_consumer(POOL),
            self._handle,
            concurrency=concurrency,
            metrics=WorkerMetrics(CollectorRegistry()),
        )

    async def _handle(self, delivery: Delivery[SampleRequest]) -> None:
        self.begun.append(delivery.message.owner)
        if not self.open:
            gate = asyncio.Event()
            self._gates.append(gate)
            await gate.wait()
        await self._bus.answer(SampleResult(request_id=delivery.message.request_id), json=delivery.json)

    def end_one(self) -> None:
        self._gates.pop(0).set()

    def end_all(self) -> None:
        self.open = True
        while self._gates:
            self.end_one()

    async def has_begun(self, count: int, seconds: float = 60.0) -> None:
        async def look() -> bool | None:
            return True if len(self.begun) >= count else None

        await eventually(look, seconds)

    async def noticed(self, line: str) -> None:
        """Wait until it knows that a line may have requests."""

        async def look() -> bool | None:
            queue = self.worker._queue
            assert isinstance(queue, Lines)
            return any(known.endswith(f".{line}") for known in queue._waiting) or None

        await eventually(look)


@contextlib.asynccontextmanager
async def replica(bus: Bus, concurrency: int) -> AsyncIterator[Replica]:
    one = Replica(bus, concurrency)
    running = asyncio.create_task(one.worker.run())
    try:
        yield one
    finally:
        one.end_all()
        await one.worker.stop(5)
        await running


def request(bus: Bus, owner: str) -> SampleRequest:
    return SampleRequest(request_id=bus.new_request(), base_model=POOL, prompt=Int32s([1]), owner=owner)


async def publish(bus: Bus, owner: str, count: int = 1) -> None:
    for first in range(0, count, 500):
        some = range(first, min(count, first + 500))
        await asyncio.gather(*(bus.publish(topology.SAMPLES, request(bus, owner), pool=POOL) for _ in some))


async def waiting(bus: Bus) -> int:
    return (await bus.stream_context.stream_info(topology.SAMPLE.name)).state.messages


async def test_one_request_begins_next_though_another_owner_has_thousands_in_the_queue(bus: Bus) -> None:
    await publish(bus, "crowd", BACKLOG)
    async with replica(bus, 4) as one:
        await one.has_begun(4)
        await publish(bus, "single")
        await one.noticed("single")
        one.end_one()
        await one.has_begun(5)
        assert one.begun == [*["crowd"] * 4, "single"]
        one.end_one()
        await one.has_begun(6)
        assert one.begun[-1] == "crowd", "and then the others go on"


async def test_requests_that_came_later_do_not_wait_for_a_backlog_that_was_there_before(bus: Bus) -> None:
    await publish(bus, "crowd", BACKLOG)
    await publish(bus, "few", 10)
    async with replica(bus, 8) as one:
        one.open = True
        await one.has_begun(BACKLOG + 10)
        places = [place for place, owner in enumerate(one.begun) if owner == "few"]
        # 4 of each at first; then "few" has the next places that become free until it has its share again.
        assert places[-1] < 40, places

        async def empty() -> bool | None:
            return True if not await waiting(bus) else None

        await eventually(empty)


async def test_many_owners_each_have_one_of_the_first_places(bus: Bus) -> None:
    owners = [f"owner-{number}" for number in range(16)]
    for owner in owners:
        await publish(bus, owner, 50)
    async with replica(bus, 16) as one:
        await one.has_begun(16)
        assert sorted(one.begun) == sorted(owners)
        for _ in range(16):
            one.end_one()
        await one.has_begun(32)
        assert sorted(one.begun[16:]) == sorted(owners)


async def test_a_client_that_knows_no_owners_has_a_line_like_any_other(bus: Bus) -> None:
    await publish(bus, "crowd", BACKLOG)
    async with replica(bus, 4) as one:
        await one.has_begun(4)
        heard = await bus.client.subscribe("rl.v1.results.from-anywhere")
        body = {"request_id": "from-anywhere", "base_model": POOL, "prompt": [1], "owner": "stranger"}
        await bus.stream_context.publish("rl.v1.sample.tiny", json.dumps(body).encode())
        await one.noticed(POOL)
        one.end_one()
        await one.has_begun(5)
        assert one.begun[4] == "stranger"
        one.end_all()
        assert json.loads((await heard.next_msg(timeout=20)).data)["kind"] == "sample"


async def test_replicas_share_the_lines_and_what_one_hands_back_another_does(bus: Bus) -> None:
    await publish(bus, "crowd", 40)
    await publish(bus, "few", 4)
    async with replica(bus, 8) as first:
        await first.has_begun(8)
        async with replica(bus, 8) as second:
            await second.has_begun(8)
            await first.worker.stop(0)
            second.end_all()
            await second.has_begun(44 - 8 + 8)
        assert sorted(second.begun).count("few") == 4
    assert not await waiting(bus)


async def test_a_consumer_that_the_server_has_forgotten_is_made_again(bus: Bus) -> None:
    async with replica(bus, 2) as one:
        one.open = True
        await publish(bus, "owner")
        await one.has_begun(1)
        line = topology.sampler_consumer(POOL).line("rl.v1.sample.tiny.owner")
        await bus.stream_context.delete_consumer(topology.SAMPLE.name, line.name)
        await publish(bus, "owner")
        await one.has_begun(2)


async def test_there_may_be_more_owners_than_the_server_keeps_consumers_for(bus: Bus) -> None:
    owners = [f"owner-{number}" for number in range(1100)]  # nats-server 2.15 keeps a thousand
    async with replica(bus, 32) as one:
        one.open = True
        for first in range(0, len(owners), 100):
            await asyncio.gather(*(publish(bus, owner) for owner in owners[first : first + 100]))
        await one.has_begun(len(owners), seconds=50)  # less than the server takes to forget one by itself
        assert set(one.begun) == set(owners)
