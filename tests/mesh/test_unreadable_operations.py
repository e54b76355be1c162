"""What cannot be read in a run's log, or never comes, is told to whoever asked; nobody waits for ever."""

from __future__ import annotations

import pytest

from services.trainer import runs as runs_module
from shared import topology, wire
from shared.bus import REQUEST_HEADER, Bus
from shared.contracts.results import RequestFailed
from shared.contracts.training import OptimStep
from shared.errors import UserError
from tests.mesh.harness import Place, eventually
from tests.mesh.producer import Producer


async def put(producer: Producer, body: bytes, *, msg_id: str, request: str = "") -> None:
    """Store bytes in a run's log."""
    headers = {"Nats-Msg-Id": msg_id, **({REQUEST_HEADER: request} if request else {})}
    await producer.bus._store(topology.OPERATIONS.subject(run=producer.run), body, headers)


async def failure(bus: Bus, request: str) -> str:
    answer = await eventually(lambda: bus.answer_of(request))
    assert isinstance(answer, RequestFailed)
    return answer.failure.message


async def test_an_operation_that_cannot_be_read_fails_alone_and_the_next_goes_on(place: Place, bus: Bus) -> None:
    producer = Producer(bus, "session:train:0")
    async with place.trainer(replica="trainer-1"):
        await producer.create()
        request = bus.new_request()
        await put(producer, b"\xff not an operation", msg_id=f"{producer.run}/1", request=request)
        producer.seq = 2
        before = await producer.send(producer.train([5, 6, 7], forward_only=True))
        assert "not a valid" in await failure(bus, request)
        mended = OptimStep(run=producer.run, seq=1, request_id=bus.new_request())
        with pytest.raises(UserError, match="its seq 1 was used up"):
            await bus.ask(topology.OPERATIONS, mended, msg_id="mended", timeout=30, run=producer.run)
        body = b'{"op": "dance", "run": "session:train:0", "seq": 3, "request_id": "q"}'
        await put(producer, body, msg_id="without-a-seq")
        await put(producer, b"", msg_id="nothing-at-all")
        await put(producer, b"", msg_id=f"{producer.run}/1000")  # nobody waits for it
        producer.seq = 4
        await producer.send(producer.train([5, 6, 7], forward_only=True))
    async with place.trainer(replica="trainer-2"):  # takes over where holes were
        after = await producer.send(producer.train([5, 6, 7], forward_only=True))
        assert after.metrics == before.metrics


async def test_an_operation_of_another_run_is_refused_and_touches_neither(place: Place, bus: Bus) -> None:
    async with place.trainer():
        one, two = Producer(bus, "run-1"), Producer(bus, "run-2")
        await one.create()
        await two.create()
        before = await two.send(two.train([5, 6, 7], forward_only=True))
        await two.send(two.train([5, 6, 7]))
        stray = OptimStep(run="run-2", seq=1, request_id=bus.new_request())
        await put(one, wire.encode(stray, json=True), msg_id="stray")
        assert "says that it is of run 'run-2', not 'run-1'" in await failure(bus, stray.request_id)
        await one.send(one.train([5, 6, 7]))
        after = await two.send(two.train([5, 6, 7], forward_only=True))
        assert after.metrics == before.metrics


async def test_a_run_whose_next_operation_never_comes_fails_and_says_which(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "CLAIM_SECONDS", 0.05)
    async with place.trainer(missing_seconds=0.3):
        producer, other = Producer(bus, "run-1"), Producer(bus, "run-2")
        await producer.create()
        await other.create()
        lost = producer.train([5, 6, 7])
        with pytest.raises(UserError, match="operation 1 has not come"):
            await producer.send(producer.step())
        with pytest.raises(UserError, match="operation 1 has not come"):
            await producer.send(producer.step())
        with pytest.raises(UserError, match="operation 1 has not come"):
            await producer.send(lost)
        await other.send(other.train([5, 6, 7]))


async def test_a_run_reads_only_so_far_ahead_for_what_is_missing(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "CLAIM_SECONDS", 0.05)
    async with place.trainer(max_backlog=1):
        producer = Producer(bus, "run-1")
        await producer.create()
        producer.seq = 2
        steps = [producer.step() for _ in range(40)]
        for step in steps:
            await bus.publish(topology.OPERATIONS, step, msg_id=f"run-1/{step.seq}", run="run-1")
        assert "though 16 later ones have" in await failure(bus, steps[-1].request_id)
