"""Measures one gateway process: sample requests a second, and how quickly it answers while many polls wait.

    python -m loadtest.gateway [--seconds 20] [--concurrency 128] [--polls 2000] [--json FILE] [--pin CORE]

A real nats-server and a real gateway with an echo worker, a process that answers each request for samples at once. The
client (`loadtest.bare_http`) submits, polls, and submits again on each of its connections, with the headers that the
tinker client sends. The gateway has one core for itself where `--pin` names one; everything else takes the others.

Beside the rate that a busy machine allows, the processor time that the gateway takes for a request is measured: what a
core gives that nobody else uses.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import platform
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import uvloop
from nats.aio.msg import Msg

from loadtest.bare_http import Connection, request
from services.local.nats_server import NatsServer
from shared import topology, wire
from shared.blobs import BlobStore
from shared.bus import REQUEST_HEADER, Bus
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.replicas import ReplicaRecord
from shared.contracts.sampling import SampledSequence, SampleRequest, SampleResult
from shared.contracts.tenants import KeyRecord

ECHO, SILENT = "echo", "silent"
"""Models: one whose samples are answered at once, and one whose samples never are."""
PROMPT_TOKENS, NEW_TOKENS = 128, 16
WARM_SECONDS = 3.0
HEARTBEAT_INTERVAL = 0.02
WANTED_RATE = 1000.0
"""Sample requests a second; the best figure found of others is 520 submissions (without their results)."""
WANTED_P99 = 0.1
"""Seconds for a heartbeat while polls wait."""


@dataclass(frozen=True)
class Rate:
    """Samples, each submitted and its result fetched."""

    concurrency: int
    samples: int
    seconds: float
    per_second: float
    cpu_ms: float
    """Processor time of the gateway for one."""
    per_core_second: float
    """Samples for each second of processor time."""
    p50_ms: float
    p99_ms: float
    """From the submission to the result."""


@dataclass(frozen=True)
class Waiting:
    """Heartbeats while polls wait."""

    polls: int
    seconds: float
    heartbeats: int
    p50_ms: float
    p99_ms: float
    worst_ms: float
    polls_answered: int
    cpu_share: float
    """Of a core, taken by the gateway."""


class Client:
    """A client of the gateway."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._headers = {
            "X-API-Key": key,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "AsyncTinker/Python 0.38.0",
            "X-Stainless-Lang": "python",
            "X-Stainless-Package-Version": "0.38.0",
            "X-Idempotency-Key": "stainless-python-retry-00000000-0000-0000-0000-000000000000",
        }

    async def connection(self) -> Connection:
        """A new connection."""
        return await Connection.open("127.0.0.1", self._port)

    def request(self, path: str, body: bytes, **more: str) -> bytes:
        """A request as the tinker client sends it."""
        return request(f"/api/v1/{path}", body, {**self._headers, **more})

    async def call(self, connection: Connection, path: str, body: Any) -> Any:
        """A request and its answer, in JSON."""
        status, answer = await connection.post(self.request(path, json.dumps(body).encode()))
        if status != 200:
            raise RuntimeError(f"{path} was answered with {status}: {answer.decode()}")
        return json.loads(answer)

    async def sampler(self, connection: Connection, session: str, number: int, model: str) -> str:
        """A sampler of a base model."""
        body = {"session_id": session, "sampling_session_seq_id": number, "base_model": model}
        return str((await self.call(connection, "create_sampling_session", body))["sampling_session_id"])


class OnePoll:
    """Waits for all samples of a sampler with one poll, as a client does when the gateway asks it to."""

    def __init__(self, client: Client, connection: Connection, sampler: str) -> None:
        self._client, self._connection = client, connection
        self._target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
        self._done: dict[str, asyncio.Event] = {}

    async def keep(self) -> None:
        """Poll for ever."""
        cursor = 0
        while True:
            asked = {"target": self._target, "prev_cursor": cursor, "retrieved_request_ids": []}
            answer = await self._client.call(self._connection, "retrieve_futures", asked)
            cursor = answer["cursor"]
            for completion in answer["completions"]:
                self._event(completion["request_id"]).set()

    async def wait(self, request_id: str) -> None:
        """Return once a request is answered."""
        await self._event(request_id).wait()
        del self._done[request_id]

    def _event(self, request_id: str) -> asyncio.Event:
        return self._done.setdefault(request_id, asyncio.Event())


# -- the two measurements --------------------------------------------------------------------------------------------


async def rate(
    client: Client, gateway: psutil.Process, *, concurrency: int, seconds: float, one_poll: bool = False
) -> Rate:
    """Submit and fetch on each of `concurrency` connections, one sample after another.

    `one_poll`: wait for all of them with one poll and fetch what it names, rather than with a poll for each.
    """
    connections = [await client.connection() for _ in range(concurrency)]
    session = (await client.call(connections[0], "create_session", {"tags": [], "sdk_version": "0.38.0"}))["session_id"]
    sampler = await client.sampler(connections[0], session, 0, ECHO)
    latencies: list[float] = []
    numbers = iter(range(10**9))
    poll = OnePoll(client, await client.connection(), sampler) if one_poll else None
    polling = asyncio.create_task(poll.keep()) if poll is not None else None
    ends = time.perf_counter() + WARM_SECONDS

    async def ask(connection: Connection) -> None:
        while time.perf_counter() < ends:
            started = time.perf_counter()
            await _sample(client, connection, sampler, next(numbers), poll)
            latencies.append(time.perf_counter() - started)

    await asyncio.gather(*map(ask, connections))
    latencies.clear()
    began, used = time.perf_counter(), _cpu(gateway)
    ends = began + seconds
    await asyncio.gather(*map(ask, connections))
    took, cpu = time.perf_counter() - began, _cpu(gateway) - used
    if polling is not None:
        polling.cancel()
    for connection in connections:
        connection.close()
    count = len(latencies)
    p50, p99 = _percentiles(latencies)
    return Rate(concurrency, count, took, count / took, cpu / count * 1e3, count / cpu, p50 * 1e3, p99 * 1e3)


async def waiting(client: Client, gateway: psutil.Process, *, polls: int, seconds: float) -> Waiting:
    """Heartbeats while `polls` polls wait, each on its own connection, and are held, answered and asked again."""
    first = await client.connection()
    session = (await client.call(first, "create_session", {"tags": [], "sdk_version": "0.38.0"}))["session_id"]
    sampler = await client.sampler(first, session, 0, SILENT)
    connections = [await client.connection() for _ in range(polls)]
    answered = 0

    async def poll(connection: Connection, number: int) -> None:
        nonlocal answered
        body = await _submit(client, connection, sampler, number)
        while True:
            status, _ = await connection.post(client.request("retrieve_future", body))
            if status != 200:
                raise RuntimeError(f"a poll was answered with {status}")
            answered += 1

    waiters = [asyncio.create_task(poll(connection, number)) for number, connection in enumerate(connections)]
    await asyncio.sleep(WARM_SECONDS)
    latencies: list[float] = []
    began, used = time.perf_counter(), _cpu(gateway)
    while time.perf_counter() < began + seconds:
        started = time.perf_counter()
        await client.call(first, "session_heartbeat", {"session_id": session})
        latencies.append(time.perf_counter() - started)
        await asyncio.sleep(HEARTBEAT_INTERVAL)
    took, cpu = time.perf_counter() - began, _cpu(gateway) - used
    for waiter in waiters:
        if waiter.done():
            waiter.result()
        waiter.cancel()
    for connection in (first, *connections):
        connection.close()
    p50, p99 = _percentiles(latencies)
    worst = max(latencies)
    return Waiting(polls, took, len(latencies), p50 * 1e3, p99 * 1e3, worst * 1e3, answered, cpu / took)


async def _sample(client: Client, connection: Connection, sampler: str, number: int, poll: OnePoll | None) -> None:
    body = await _submit(client, connection, sampler, number)
    if poll is not None:
        await poll.wait(json.loads(body)["request_id"])
    status, answer = await connection.post(client.request("retrieve_future", body, Accept="application/x-protobuf"))
    if status != 200 or len(answer) < NEW_TOKENS * 8:
        raise RuntimeError(f"a poll was answered with {status}: {answer!r}")


async def _submit(client: Client, connection: Connection, sampler: str, number: int) -> bytes:
    """Ask for a sample; returns the body of a poll for it."""
    tokens = [1000 + (number + place) % 1000 for place in range(PROMPT_TOKENS)]
    asked = {
        "num_samples": 1,
        "prompt": {"chunks": [{"tokens": tokens, "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": NEW_TOKENS, "temperature": 1.0, "top_k": -1, "top_p": 1.0},
        "sampling_session_id": sampler,
        "seq_id": number,
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "record_stability_info": False,
        "type": "sample",
    }
    status, answer = await connection.post(client.request("asample", json.dumps(asked).encode()))
    if status != 200:
        raise RuntimeError(f"a submission was answered with {status}: {answer.decode()}")
    return json.dumps({"request_id": json.loads(answer)["request_id"], "allow_metadata_only": True}).encode()


# -- the echo worker -------------------------------------------------------------------------------------------------


async def echo(nats_url: str, directory: str) -> None:
    """Answer each request for samples of `ECHO` at once, for ever.

    What it answers stays in the queue, so that this process costs as little as it can; the queue is emptied at the end.
    """
    bus = await Bus.connect(nats_url, BlobStore(directory), name="echo")
    sequence = SampledSequence(
        tokens=Int32s(range(NEW_TOKENS)), logprobs=Float32s([-0.5] * NEW_TOKENS), stop_reason="length"
    )

    async def answer(message: Msg) -> None:
        asked: SampleRequest = wire.decode(message.data, SampleRequest, json=False)
        result = SampleResult(request_id=asked.request_id, sequences=[sequence] * asked.num_samples, note=asked.note)
        headers = {wire.CONTENT_TYPE: wire.MSGPACK, REQUEST_HEADER: asked.request_id}
        subject = topology.ANSWERS.subject(request=asked.request_id)
        await bus.client.publish(subject, wire.encode(result, json=False), headers=headers)

    await bus.client.subscribe(topology.SAMPLES.subject(pool=ECHO), cb=answer)
    await asyncio.Event().wait()


# -- processes -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def running(directory: Path, core: int | None) -> AsyncIterator[tuple[Client, psutil.Process, Bus]]:
    """Server, gateway and echo worker as processes, and a client with a key."""
    others = [number for number in sorted(os.sched_getaffinity(0)) if number != core]
    if core is not None and others:
        os.sched_setaffinity(0, others)
    async with contextlib.AsyncExitStack() as stack:
        server = await NatsServer.start(directory / "nats")
        stack.push_async_callback(server.stop)
        blobs = str(directory / "blobs")
        bus = await Bus.connect(server.url, BlobStore(blobs), name="loadtest")
        stack.push_async_callback(bus.close)
        key = f"tml-{secrets.token_hex(16)}"
        record = KeyRecord(id="key-1", tenant="default", created=time.time())
        await bus.table(topology.KEYS).put(hashlib.sha256(key.encode()).hexdigest(), record)
        for model in (ECHO, SILENT):
            await bus.table(topology.REPLICAS).put(model, _replica(model))
        await stack.enter_async_context(_process("loadtest.gateway", "--echo", server.url, blobs))
        settings = {"NATS_URL": server.url, "BLOB_URL": blobs, "PORT": "0", "REPLICA": "gateway-1"}
        environment = {f"OPENRL_GATEWAY_{name}": value for name, value in settings.items()}
        gateway = await stack.enter_async_context(_process("services.gateway", environment=environment))
        process = psutil.Process(gateway.pid)
        if core is not None:
            process.cpu_affinity([core])
        yield Client(await _gateway_port(bus), key), process, bus


def _replica(model: str) -> ReplicaRecord:
    return ReplicaRecord(
        replica=model, service="sampler", pid=0, host="127.0.0.1", metrics_port=0, ready=True, base_model=model
    )


@contextlib.asynccontextmanager
async def _process(
    module: str, *arguments: str, environment: dict[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, env={**os.environ, **(environment or {})}
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _gateway_port(bus: Bus) -> int:
    while True:
        entry = await bus.table(topology.REPLICAS).get("gateway-1")
        if entry is not None and entry.value.ready:
            return int(entry.value.offers[0].rpartition(":")[2])
        await asyncio.sleep(0.05)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _percentiles(latencies: Sequence[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(latencies, n=100)
    return cuts[49], cuts[98]


# -- the command -----------------------------------------------------------------------------------------------------


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both measurements, with where they were made."""
    with tempfile.TemporaryDirectory(prefix="loadtest-") as name:
        async with running(Path(name), arguments.pin) as (client, gateway, bus):
            found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), **_place(arguments.pin)}
            if arguments.seconds:
                done = await rate(
                    client,
                    gateway,
                    concurrency=arguments.concurrency,
                    seconds=arguments.seconds,
                    one_poll=arguments.one_poll,
                )
                found["rate"] = asdict(done)
                await bus.purge(topology.SAMPLES, pool=ECHO)
                print(_rate_row(done), flush=True)
            if arguments.polls:
                held = await waiting(client, gateway, polls=arguments.polls, seconds=arguments.poll_seconds)
                found["waiting"] = asdict(held)
                print(_waiting_row(held), flush=True)
            return found


def _place(core: int | None) -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "pinned_to": core,
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "uvloop": version("uvloop"),
    }


def _rate_row(found: Rate) -> str:
    return (
        f"| {found.concurrency} connections | {found.per_second:,.0f} samples/s (wanted {WANTED_RATE:,.0f}) | "
        f"{found.cpu_ms:.2f} ms of processor time each, {found.per_core_second:,.0f}/s of a core | "
        f"p50 {found.p50_ms:.0f} ms, p99 {found.p99_ms:.0f} ms |"
    )


def _waiting_row(found: Waiting) -> str:
    return (
        f"| {found.polls} polls waiting | {found.heartbeats} heartbeats: p50 {found.p50_ms:.1f} ms, "
        f"p99 {found.p99_ms:.1f} ms (wanted {WANTED_P99 * 1e3:.0f}), worst {found.worst_ms:.0f} ms | "
        f"{found.polls_answered} polls answered in {found.seconds:.0f} s | {found.cpu_share:.0%} of a core |"
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.gateway", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the rate; 0: leave it out")
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--one-poll", action="store_true", help="wait for all samples with one poll (retrieve_futures)")
    parser.add_argument("--polls", type=int, default=2000, help="0: leave them out")
    parser.add_argument("--poll-seconds", type=float, default=40.0, help="longer than a poll is held")
    parser.add_argument("--pin", type=int, help="the core that the gateway has for itself")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--echo", nargs=2, metavar=("NATS", "BLOBS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if arguments.echo:
            runner.run(echo(*arguments.echo))
        found = runner.run(measure(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
