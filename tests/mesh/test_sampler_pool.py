"""Replicas of a pool as processes: one that dies, one that is told to stop, and what they leave to others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from services.local.config import write_toml
from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Int32s
from shared.contracts.results import Result
from shared.contracts.sampling import SampleRequest, SampleResult, SamplingParams
from tests.mesh.harness import MODEL, Place, eventually

# Each process imports torch, and the server gives a dead replica's requests to others after ten seconds.
pytestmark = pytest.mark.timeout(240)

PATIENCE = 120.0


@contextlib.asynccontextmanager
async def replica(place: Place, bus: Bus, name: str, **settings: float) -> AsyncIterator[asyncio.subprocess.Process]:
    """A sampler as a process, ready; killed at the end if it still runs."""
    path = place.directory / f"{name}.toml"
    common = {**place.common, "base_model": MODEL, "model_dir": str(place.model_dir), "device": "cpu", "threads": 1}
    write_toml(path, {**common, "replica": name, **settings})
    with (place.directory / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.sampler", "--config", str(path), stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
        )  # fmt: skip
    try:

        async def ready() -> bool | None:
            assert process.returncode is None, (place.directory / f"{name}.log").read_text()
            entry = await bus.table(topology.REPLICAS).get(name)
            return True if entry is not None and entry.value.ready else None

        await eventually(ready, PATIENCE)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def ask(bus: Bus, *, samples: int, owner: str = "owner") -> asyncio.Task[Result]:
    request = SampleRequest(
        request_id=bus.new_request(), base_model=MODEL, prompt=Int32s([5, 6]), owner=owner, num_samples=samples,
        params=SamplingParams(max_tokens=1000, stop=[], seed=7),
    )  # fmt: skip
    return asyncio.create_task(bus.ask(topology.SAMPLES, request, timeout=PATIENCE, pool=MODEL))


async def in_work(bus: Bus, count: int, owner: str = "owner") -> None:
    """Wait until so many requests of an owner have been given out."""
    pool = topology.sampler_consumer(MODEL)
    line = pool.line(f"{pool.subject}.{owner}")

    async def look() -> bool | None:
        consumers = await bus.stream_context.consumers_info(topology.SAMPLE.name)
        found = {consumer.name: consumer.num_ack_pending for consumer in consumers}
        return True if found.get(line.name) == count else None

    await eventually(look, PATIENCE)


async def left(bus: Bus) -> int:
    return (await bus.stream_context.stream_info(topology.SAMPLE.name)).state.messages


async def until_left(bus: Bus, count: int) -> None:
    """Wait until so many requests lie in the queue: one is taken off it after its answer is stored."""

    async def look() -> bool | None:
        return True if await left(bus) == count else None

    await eventually(look)


def complete(result: Result, samples: int) -> bool:
    assert isinstance(result, SampleResult)
    return [len(sequence.tokens) for sequence in result.sequences] == [1000] * samples


async def test_what_a_killed_replica_had_in_work_is_answered_by_another(place: Place, bus: Bus) -> None:
    async with replica(place, bus, "first") as first:
        asked = [ask(bus, samples=16) for _ in range(3)]
        await in_work(bus, 3)
        first.send_signal(signal.SIGKILL)
        await first.wait()
        assert not any(task.done() for task in asked)
        async with replica(place, bus, "second"):
            assert all(complete(result, 16) for result in await asyncio.gather(*asked))
            await until_left(bus, 0)


async def test_a_replica_that_is_told_to_stop_ends_what_runs_within_its_grace(place: Place, bus: Bus) -> None:
    async with replica(place, bus, "only", drain_seconds=PATIENCE) as only:
        running = ask(bus, samples=8)
        await in_work(bus, 1)
        only.send_signal(signal.SIGTERM)
        assert await only.wait() == 0
        assert complete(await running, 8)
        later = ask(bus, samples=1)
        await until_left(bus, 1)
        later.cancel()


async def test_what_does_not_end_within_the_grace_is_handed_back(place: Place, bus: Bus) -> None:
    async with replica(place, bus, "first", drain_seconds=0.1) as first:
        asked = [ask(bus, samples=48) for _ in range(2)]  # many times the grace
        await in_work(bus, 2)
        first.send_signal(signal.SIGTERM)
        assert await first.wait() == 0
        assert not any(task.done() for task in asked)
        assert await left(bus) == 2, "handed back and not given up"
        async with replica(place, bus, "second"):
            assert all(complete(result, 48) for result in await asyncio.gather(*asked))
