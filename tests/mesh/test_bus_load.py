"""What the bus tells of its queues: also of those that nobody serves, and of messages in work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from shared import scans, tables, topology
from shared.bus import Bus, Delivery
from shared.bus_load import QueueLoad, measure
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec
from shared.contracts.sampling import SampleRequest
from shared.contracts.training import CreateRun, Lease
from shared.scans import Stored
from shared.worker import Worker, WorkerMetrics
from tests.mesh.harness import MODEL, eventually


async def ask(bus: Bus, count: int, model: str = MODEL) -> None:
    for _ in range(count):
        request = SampleRequest(request_id=bus.new_request(), base_model=model, prompt=Int32s([1, 2]))
        await bus.publish(topology.SAMPLES, request, pool=model)


async def queue(bus: Bus, channel: str, name: str, runs: dict[str, str] | None = None) -> QueueLoad | None:
    load = await measure(bus, runs or {})
    return next((each for each in load.queues if (each.channel, each.name) == (channel, name)), None)


async def test_requests_wait_although_no_sampler_was_ever_there(bus: Bus) -> None:
    await ask(bus, 3)
    await asyncio.sleep(0.05)
    seen = await queue(bus, "samples", MODEL)
    assert seen is not None
    assert (seen.waiting, seen.in_work) == (3, 0)
    assert 0.05 <= seen.oldest < 30
    assert await queue(bus, "samples", "another") is None


async def test_what_is_in_work_does_not_wait_and_what_is_done_is_gone(bus: Bus) -> None:
    begun, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def handle(_: Delivery[Any]) -> None:
        begun.release()
        await go_on.wait()

    metrics = WorkerMetrics(CollectorRegistry())
    worker = Worker(bus, topology.sampler_consumer(MODEL), handle, concurrency=2, metrics=metrics)
    await ask(bus, 5)
    running = asyncio.create_task(worker.run())
    await begun.acquire()
    await begun.acquire()

    async def two_taken() -> QueueLoad | None:
        seen = await queue(bus, "samples", MODEL)
        return seen if seen is not None and seen.in_work == 2 else None

    seen = await eventually(two_taken)
    assert seen.waiting == 3
    assert seen.oldest > 0
    go_on.set()

    async def empty() -> QueueLoad | None:
        seen = await queue(bus, "samples", MODEL)
        return seen if seen is not None and seen.waiting + seen.in_work == 0 else None

    assert (await eventually(empty)).oldest == 0
    await worker.stop(1)
    await running


async def test_groups_of_all_environments_are_one_queue_that_is_there_when_empty(bus: Bus) -> None:
    seen = await queue(bus, "groups", "")
    assert seen is not None
    assert seen.waiting == 0


async def test_operations_wait_while_no_trainer_holds_their_run(bus: Bus) -> None:
    for seq, run in enumerate(["a:train:0", "a:train:0", "b"]):
        operation = CreateRun(request_id=bus.new_request(), run=run, seq=seq, base_model=MODEL, lora=LoraSpec())
        await bus.publish(topology.OPERATIONS, operation, run=run)
    runs = {"a:train:0": MODEL, "b": MODEL, "c": "other"}
    seen = await queue(bus, "operations", MODEL, runs)
    assert seen is not None
    assert seen.waiting == 3
    assert seen.oldest > 0
    await bus.table(topology.LEASES).create(("run", "a:train:0"), Lease(holder="trainer-1"))
    seen = await queue(bus, "operations", MODEL, runs)
    assert seen is not None
    assert seen.waiting == 1
    other = await queue(bus, "operations", "other", runs)
    assert other is not None
    assert other.waiting == 0, "a group that has runs is told of when nothing waits, too"


async def test_streams_have_a_size_and_count_what_was_ever_put_in(bus: Bus) -> None:
    await ask(bus, 2)
    load = await measure(bus, {})
    streams = {stream.name: stream for stream in load.streams}
    assert streams.keys() >= {stream.name for stream in topology.STREAMS}
    sample = streams[topology.SAMPLE.name]
    assert (sample.messages, sample.published, sample.limit) == (2, 2, topology.SAMPLE.max_bytes)
    assert sample.bytes > 0
    assert load.storage > 0
    assert load.storage_limit == topology.MOST_BYTES


async def test_an_entry_that_is_written_while_all_are_read_is_there_once(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = bus.table(topology.ALIASES)
    for number in range(20):
        await table.put(f"name-{number}", "model")

    async def with_a_write(*arguments: Any, **settings: Any) -> AsyncIterator[Stored]:
        written = False
        async for item in scans.scan(*arguments, **settings):
            yield item
            if not written:
                written = True
                await table.put("name-0", "another")

    monkeypatch.setattr(scans, "BATCH", 4)  # so that what is written meanwhile is still to be read
    monkeypatch.setattr(tables, "scan", with_a_write)
    entries = await table.items()
    assert len(entries) == 20
    assert {entry.key[0]: entry.value for entry in entries} == {
        **{f"name-{number}": "model" for number in range(20)},
        "name-0": "another",
    }
    assert await table.keys() == {(f"name-{number}",) for number in range(20)}
