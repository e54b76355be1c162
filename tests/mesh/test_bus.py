"""The bus against a real server: order, idempotence, tables, answers, large bodies, dead letters, restarts."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import aiohttp
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from services.coordinator.config import CoordinatorConfig
from services.coordinator.service import CoordinatorService
from services.local.nats_server import NatsServer
from shared import topology
from shared.blobs import BlobStore
from shared.bus import Bus, Delivery
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.jobs import JobChanged
from shared.contracts.results import DeadLetter
from shared.contracts.sampling import SampledSequence, SampleRequest, SampleResult
from shared.contracts.training import Lease
from shared.errors import PermanentError, TemporaryError, UserError
from shared.process import running
from shared.worker import Worker, WorkerMetrics


def request(bus: Bus, prompt: list[int] | None = None) -> SampleRequest:
    return SampleRequest(request_id=bus.new_request(), base_model="tiny", prompt=Int32s(prompt or [1, 2]))


async def collect(bus: Bus, count: int, *, after: int = 0) -> list[Delivery[JobChanged]]:
    found: list[Delivery[JobChanged]] = []
    async with asyncio.timeout(20):
        async for delivery in bus.follow(topology.JOB_PHASES, after=after):
            found.append(delivery)
            if len(found) == count:
                break
    return found


@contextlib.asynccontextmanager
async def sampling_worker(bus: Bus, handle, concurrency: int = 4):  # type: ignore[no-untyped-def]
    worker = Worker(
        bus,
        topology.sampler_consumer("tiny"),
        handle,
        concurrency=concurrency,
        metrics=WorkerMetrics(CollectorRegistry()),
    )
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        await worker.stop(2)
        await task


async def test_followers_see_earlier_and_later_messages_once_and_in_order(bus: Bus) -> None:
    for number in range(3):
        await bus.publish(topology.JOB_PHASES, JobChanged(job=f"job-{number}", phase="queued"), job=f"job-{number}")
    reading = asyncio.create_task(collect(bus, 6))
    for number in range(3, 6):
        await asyncio.sleep(0.01)
        await bus.publish(topology.JOB_PHASES, JobChanged(job=f"job-{number}", phase="queued"), job=f"job-{number}")
    assert [delivery.message.job for delivery in await reading] == [f"job-{number}" for number in range(6)]


async def test_a_message_id_that_was_seen_is_dropped(bus: Bus) -> None:
    message = JobChanged(job="a", phase="queued")
    first = await bus.publish(topology.JOB_PHASES, message, msg_id="same", job="a")
    second = await bus.publish(topology.JOB_PHASES, message, msg_id="same", job="a")
    assert first == second


async def test_a_request_is_answered_by_a_worker(bus: Bus) -> None:
    async def handle(delivery: Delivery[SampleRequest]) -> None:
        sequence = SampledSequence(tokens=Int32s([7]), logprobs=Float32s([-0.5]), stop_reason="stop")
        await bus.answer(SampleResult(request_id=delivery.message.request_id, sequences=[sequence]))

    async with sampling_worker(bus, handle):
        result = await bus.ask(topology.SAMPLES, request(bus), timeout=10, pool="tiny")
    assert isinstance(result, SampleResult)
    assert list(result.sequences[0].tokens) == [7]


async def test_a_body_over_the_limit_travels_by_blob_and_is_removed_when_done(bus: Bus, tmp_path: Path) -> None:
    seen: list[int] = []

    async def handle(delivery: Delivery[SampleRequest]) -> None:
        seen.append(len(delivery.message.prompt))
        await bus.answer(SampleResult(request_id=delivery.message.request_id))

    async with sampling_worker(bus, handle):
        await bus.ask(topology.SAMPLES, request(bus, [5] * 400_000), timeout=10, pool="tiny")
    assert seen == [400_000]
    assert not [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]


async def test_a_user_error_is_answered_at_once_and_kept_as_a_dead_letter(bus: Bus) -> None:
    tries = 0

    async def handle(_: Delivery[SampleRequest]) -> None:
        nonlocal tries
        tries += 1
        raise UserError("the prompt is empty: send at least one token")

    async with sampling_worker(bus, handle):
        with pytest.raises(UserError, match="the prompt is empty"):
            await bus.ask(topology.SAMPLES, request(bus), timeout=10, pool="tiny")
    assert tries == 1
    letter = await first_dead_letter(bus)
    assert letter.stream == "SAMPLE"
    assert "the prompt is empty" in letter.reason


async def first_dead_letter(bus: Bus) -> DeadLetter:
    async with asyncio.timeout(10):
        async for delivery in bus.follow(topology.DEAD_LETTERS):
            return delivery.message
    raise AssertionError("no dead letter")


async def test_a_defect_is_tried_again_and_given_up_with_an_answer(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.worker.DEFECT_DELAY", 0.01)
    tries = 0

    async def handle(_: Delivery[SampleRequest]) -> None:
        nonlocal tries
        tries += 1
        raise ZeroDivisionError("oops")

    async with sampling_worker(bus, handle):
        with pytest.raises(PermanentError, match="ZeroDivisionError: oops"):
            await bus.ask(topology.SAMPLES, request(bus), timeout=20, pool="tiny")
    assert tries == topology.sampler_consumer("tiny").max_deliver


async def test_a_temporary_error_is_tried_again_until_it_works(bus: Bus) -> None:
    tries = 0

    async def handle(delivery: Delivery[SampleRequest]) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise TemporaryError("not yet", delay=0.01)
        await bus.answer(SampleResult(request_id=delivery.message.request_id))

    async with sampling_worker(bus, handle):
        await bus.ask(topology.SAMPLES, request(bus), timeout=10, pool="tiny")
    assert tries == 3


async def test_undecodable_bytes_are_buried_and_their_asker_told(bus: Bus) -> None:
    async def handle(_: Delivery[SampleRequest]) -> None:
        raise AssertionError("never called")

    async with sampling_worker(bus, handle):
        asker = bus.new_request()
        subject = topology.SAMPLES.subject(pool="tiny")
        await bus.stream_context.publish(subject, b'{"prompt": "text"}', headers={"Openrl-Request": asker})
        letter = await first_dead_letter(bus)
        assert "not a valid SampleRequest" in letter.reason
        async with asyncio.timeout(5):
            while (answer := await bus.answer_of(asker)) is None:
                await asyncio.sleep(0.01)
        assert "not a valid SampleRequest" in str(answer)


@pytest.mark.parametrize(
    ("body", "request_id", "complaint"),
    [
        (b'{"prompt": "text", "request_id": "c1"}', "c1", "not a valid SampleRequest"),
        (b'{"request_id": "c2", "prompt": [1],}', "c2", "malformed"),
        (msgspec.msgpack.encode({"request_id": "a.b.c"}), "a.b.c", "missing required field"),
        (b'{"request_id": 7}', "7", "Expected `str`"),
        (b'{"base_model": NaN, "request_id": "c3"}', "c3", "malformed"),
    ],
)
async def test_who_asked_is_found_in_the_body_of_a_bare_client(
    bus: Bus, body: bytes, request_id: str, complaint: str
) -> None:
    async def handle(_: Delivery[SampleRequest]) -> None:
        raise AssertionError("never called")

    async with sampling_worker(bus, handle):
        heard = await bus.client.subscribe(f"rl.v1.results.{request_id}")
        for _ in range(2):  # such a client may use an id again, and is answered again
            await bus.stream_context.publish(topology.SAMPLES.subject(pool="tiny"), body)
            assert complaint in (await heard.next_msg(timeout=10)).data.decode()


@pytest.mark.parametrize("body", [b"train my model, please", b"", b"3", b'"text"', b"\xff\xfe"])
async def test_bytes_without_a_request_id_are_buried_in_words(bus: Bus, body: bytes) -> None:
    async def handle(_: Delivery[SampleRequest]) -> None:
        raise AssertionError("never called")

    async with sampling_worker(bus, handle):
        await bus.stream_context.publish(topology.SAMPLES.subject(pool="tiny"), body)
        assert "neither a JSON object nor a MessagePack map" in (await first_dead_letter(bus)).reason


async def test_a_stopping_worker_hands_its_message_to_the_next(bus: Bus) -> None:
    begun = asyncio.Event()

    async def hang(_: Delivery[SampleRequest]) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def handle(delivery: Delivery[SampleRequest]) -> None:
        await bus.answer(SampleResult(request_id=delivery.message.request_id))

    asking = None
    async with sampling_worker(bus, hang) as first:
        asking = asyncio.create_task(bus.ask(topology.SAMPLES, request(bus), timeout=15, pool="tiny"))
        await begun.wait()
        await first.stop(0)
    async with sampling_worker(bus, handle):
        assert isinstance(await asking, SampleResult)


async def test_tables_compare_and_set(bus: Bus) -> None:
    leases = bus.table(topology.LEASES)
    key = "session:train:0"
    revision = await leases.create(key, Lease(holder="a"))
    assert revision is not None
    assert await leases.create(key, Lease(holder="b")) is None
    newer = await leases.update(key, Lease(holder="a2"), revision)
    assert newer is not None
    assert await leases.update(key, Lease(holder="b"), revision) is None
    assert [(entry.key, entry.value.holder) for entry in await leases.items()] == [((key,), "a2")]
    await leases.delete(key)
    assert await leases.get(key) is None
    assert await leases.create(key, Lease(holder="c")) is not None


async def test_a_restarted_server_loses_nothing_and_wakes_its_readers(tmp_path: Path) -> None:
    server = await NatsServer.start(tmp_path / "nats")
    port = int(server.url.rsplit(":", 1)[1])
    bus = await Bus.connect(server.url, BlobStore(str(tmp_path / "blobs")), name="test")
    await bus.publish(topology.JOB_PHASES, JobChanged(job="before", phase="queued"), job="before")
    reading = asyncio.create_task(collect(bus, 2))
    server.process.kill()
    await server.process.wait()
    publishing = asyncio.create_task(
        bus.publish(topology.JOB_PHASES, JobChanged(job="after", phase="queued"), job="after")
    )
    server = await NatsServer.start(tmp_path / "nats", port=port)
    await publishing
    assert [delivery.message.job for delivery in await reading] == ["before", "after"]
    await bus.close()
    await server.stop()


async def test_a_service_without_its_bus_cannot_work_but_is_alive(tmp_path: Path) -> None:
    server = await NatsServer.start(tmp_path / "nats")
    settings = {"nats_url": server.url, "blob_url": str(tmp_path / "blobs"), "metrics_port": 0, "drain_seconds": 0.1}
    config = CoordinatorConfig(**settings, metrics_dir=str(tmp_path))  # type: ignore[arg-type]
    async with running("coordinator", config, CoordinatorService) as (_, node), aiohttp.ClientSession() as http:
        (replica,) = await node.bus.table(topology.REPLICAS).items()

        async def status(path: str) -> int:
            async with http.get(f"http://127.0.0.1:{replica.value.metrics_port}/{path}") as answer:
                return answer.status

        assert (await status("healthz"), await status("livez")) == (200, 200)
        await server.stop()
        async with asyncio.timeout(10):
            while await status("healthz") == 200:
                await asyncio.sleep(0.02)
        assert (await status("healthz"), await status("livez")) == (503, 200)
        await node.bus.client.close()  # what the library does when a server refuses to let us in again
        assert await status("livez") == 503


async def test_connecting_to_nothing_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.bus.CONNECT_PATIENCE", 0.3)
    with pytest.raises(UserError, match="no nats-server answers at nats://127.0.0.1:1"):
        await Bus.connect("nats://127.0.0.1:1", BlobStore(str(tmp_path)), name="test")


async def test_a_value_over_the_limit_of_the_bus_is_refused_with_its_size(bus: Bus) -> None:
    table = bus.table(topology.LEASES)
    with pytest.raises(PermanentError, match=r"a message of \d+ bytes for \S+ is over the 1048576 bytes"):
        await table.create("big", Lease(holder="x" * (1 << 20)))
    # Only with its headers it is too long, at which the server would close the connection.
    spare = len('{"holder":""}')
    with pytest.raises(PermanentError, match="over the 1048576 bytes"):
        await table.put("big", Lease(holder="x" * ((1 << 20) - spare)))
    with pytest.raises(PermanentError, match="over the 1048576 bytes"):
        await bus.publish(topology.JOB_PHASES, JobChanged(job="j", phase="queued"), msg_id="x" * (1 << 20), job="j")
    revision = await table.create("big", Lease(holder="fits"))
    assert revision is not None
    largest = (1 << 20) - spare - len(f"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: {revision}\r\n\r\n")
    assert await table.update("big", Lease(holder="x" * largest), revision) is not None


async def test_an_entry_that_cannot_be_read_is_passed_over(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    table = bus.table(topology.LEASES)
    await table.put("one", Lease(holder="a"))
    await bus.stream_context.publish("$KV.leases.two", b'{"holder": 3}')
    await table.put("three", Lease(holder="c"))
    assert [entry.key for entry in await table.items()] == [("one",), ("three",)]
    seen = []
    async for change in table.changes():
        seen.append(change.key[0])
        if len(seen) == 2:
            break
    assert seen == ["one", "three"]
    assert "the entry $KV.leases.two is passed over" in caplog.text
    with pytest.raises(UserError, match="not a valid Lease"):
        await table.get("two")
