"""Clients of a gateway in tests: the real SDK, and bare HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import tinker

from shared import topology
from shared.bus import Bus
from shared.contracts.tenants import KeyRecord

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
