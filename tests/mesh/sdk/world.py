"""A mesh in a thread of its own, so that tests may use the blocking client as scripts do, and clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tinker

from services.local.nats_server import NatsServer
from shared.blobs import BlobStore
from shared.bus import Bus
from tests.mesh.gateways import add_key
from tests.mesh.harness import MODEL, Place

T = TypeVar("T")
SECONDS = 120.0


class World:
    """A trainer, a sampler, a coordinator and two gateways, all real."""

    def __init__(self, directory: Path, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._directory = directory
        self._up: asyncio.Future[None] | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="mesh")

    def start(self) -> None:
        self._thread.start()
        if not self._ready.wait(SECONDS):
            raise TimeoutError("the mesh does not come up")

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def do(self, what: Callable[[Bus], Awaitable[T]]) -> T:
        """Something on the bus."""

        async def done() -> T:
            return await what(self.bus)

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(SECONDS)

    @contextlib.contextmanager
    def user(self, **fields: Any) -> Iterator[User]:
        """A tenant of its own, who sees nothing of other tests. `fields` are those of its key."""
        tenant = f"t-{uuid.uuid4().hex[:8]}"
        key = f"tml-{tenant}"
        self.do(lambda bus: add_key(bus, key, tenant, **fields))
        user = User(self, tenant, key)
        try:
            yield user
        finally:
            user.close()

    async def _run(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        server = await NatsServer.start(self._directory / "nats")
        place = Place(server.url, self._directory, self.model_dir)
        try:
            async with (
                place.trainer(),
                place.sampler(),
                place.coordinator(janitor_seconds=0.5, session_grace_seconds=2.0),
                place.gateway() as gateway,
                place.gateway(replica="gateway-2", poll_seconds=0.2) as impatient,
            ):
                self.url, self.impatient_url = (f"http://127.0.0.1:{each.port}" for each in (gateway, impatient))
                self.bus = await Bus.connect(server.url, BlobStore(str(self._directory / "blobs")), name="test")
                self._ready.set()
                await self._stopping.wait()
                await self.bus.close()
        finally:
            await server.stop()


class User:
    """A tenant with its clients."""

    def __init__(self, world: World, tenant: str, key: str) -> None:
        self.world = world
        self.tenant = tenant
        self.key = key
        self._services: list[tinker.ServiceClient] = []
        self.rest = tinker.RestClient(base_url=world.url, api_key=key)
        self.service = self.another()

    def another(self, *, url: str = "", **settings: Any) -> tinker.ServiceClient:
        """One more client, with a session of its own."""
        client = tinker.ServiceClient(base_url=url or self.world.url, api_key=self.key, **settings)
        self._services.append(client)
        return client

    def train(self, rank: int = 8, seed: int = 1, **settings: Any) -> tinker.TrainingClient:
        """A run with a fresh adapter."""
        return self.service.create_lora_training_client(MODEL, rank=rank, seed=seed, **settings).result(SECONDS)

    def base(self) -> tinker.SamplingClient:
        """A sampler of the base model."""
        return self.service.create_sampling_client(base_model=MODEL).result(SECONDS)

    def close(self) -> None:
        for client in self._services:
            client.close("success").result(SECONDS)


def wait(awaitable: Awaitable[T]) -> T:
    """What an awaitable of the client gives."""

    async def given() -> T:
        return await awaitable

    return asyncio.run(given())
