"""Clients of a gateway in tests: the real SDK, and bare HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import tinker
from tinker.proto.response_conv import deserialize_sample_response

from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.replicas import ReplicaRecord
from shared.contracts.sampling import SampledSequence, SampleResult
from shared.contracts.tenants import KeyRecord
from tests.mesh.harness import MODEL, eventually

KEY = "tml-test-key-of-the-default-tenant"
OTHER_KEY = "tml-test-key-of-somebody-else"


async def add_key(bus: Bus, key: str = KEY, tenant: str = "default", **fields: Any) -> KeyRecord:
    record = KeyRecord(id=f"key-of-{tenant}", tenant=tenant, created=time.time(), **fields)
    await bus.table(topology.KEYS).put(hashlib.sha256(key.encode()).hexdigest(), record)
    return record


@contextlib.asynccontextmanager
async def http(port: int, key: str | None = KEY) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"X-API-Key": key} if key else {}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1/", headers=headers, timeout=60) as client:
        yield client


async def new_session(client: httpx.AsyncClient) -> str:
    answer = await client.post("create_session", json={"tags": [], "sdk_version": "test"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["session_id"])


@contextlib.asynccontextmanager
async def sdk(port: int, key: str = KEY) -> AsyncIterator[tinker.ServiceClient]:
    """The real client. Its calls block, or wait for its own thread: make them in `asyncio.to_thread`."""

    def connect() -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key=key)

    client = await asyncio.to_thread(connect)
    try:
        yield client
    finally:
        await asyncio.wrap_future(client.close("success").future())


class Asker:
    """Asks a gateway for samples, by HTTP, of a model that the test itself stands in for."""

    def __init__(self, client: httpx.AsyncClient, session: str, sampler: str) -> None:
        self.client = client
        self.session = session
        self.sampler = sampler

    @classmethod
    async def connect(cls, client: httpx.AsyncClient, bus: Bus, model: str = MODEL) -> Asker:
        await announce(bus, model)
        session = await new_session(client)
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": model}

        async def made() -> str | None:
            answer = await client.post("create_sampling_session", json=body)
            return str(answer.json()["sampling_session_id"]) if answer.status_code == 200 else None

        return cls(client, session, await eventually(made))

    async def submit(self, seq: int, tokens: Sequence[int] = (5, 6), **fields: Any) -> httpx.Response:
        body: dict[str, Any] = {
            "sampling_session_id": self.sampler,
            "seq_id": seq,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]},
            "sampling_params": {"max_tokens": 2},
        }
        return await self.client.post("asample", json={**body, **fields})

    async def request(self, seq: int, **fields: Any) -> str:
        answer = await self.submit(seq, **fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])


async def announce(bus: Bus, model: str = MODEL, service: str = "sampler") -> None:
    """Say that there is a replica, which the test itself stands in for."""
    record = ReplicaRecord(
        replica=f"{service}-{model}", service=service, pid=0, host="127.0.0.1", metrics_port=0, base_model=model
    )
    await bus.table(topology.REPLICAS).put(record.replica, record)


async def poll(client: httpx.AsyncClient, request: str, **fields: Any) -> httpx.Response:
    return await client.post("retrieve_future", json={"request_id": request, **fields})


def tokens_in(answer: httpx.Response) -> list[list[int]]:
    assert answer.headers["content-type"] == "application/x-protobuf", answer.text
    return [list(sequence.tokens) for sequence in deserialize_sample_response(answer.content).sequences]


def sampled(request: str, tokens: Sequence[int]) -> SampleResult:
    sequence = SampledSequence(tokens=Int32s(tokens), logprobs=Float32s([-0.5] * len(tokens)), stop_reason="stop")
    return SampleResult(request_id=request, sequences=[sequence])
