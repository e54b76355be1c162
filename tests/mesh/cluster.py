"""Three nats-servers on loopback that form a cluster, with the configuration that the manifests give them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from services.local.nats_server import find_binary
from shared.bus import Login

CONFIG = Path(__file__).parents[2] / "k8s/base/nats/nats.conf"
LOGIN = Login(user="openrl", password="from-the-secret")


class Cluster:
    """The servers by name, `nats-0` to `nats-2`. Only where they listen and store is their own."""

    def __init__(self, directory: Path, ports: list[int]) -> None:
        self._directory = directory
        self._clients, self._routes, self._monitors = ports[:3], ports[3:6], ports[6:9]
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    @property
    def url(self) -> str:
        return ",".join(f"nats://127.0.0.1:{port}" for port in self._clients)

    def url_of(self, name: str) -> str:
        return f"nats://127.0.0.1:{self._clients[int(name[-1])]}"

    def monitor(self, name: str) -> str:
        return f"http://127.0.0.1:{self._monitors[int(name[-1])]}"

    async def start(self, name: str) -> None:
        number = int(name[-1])
        place = self._directory / name
        place.mkdir(parents=True, exist_ok=True)
        config = place / "nats.conf"
        config.write_text(CONFIG.read_text().replace('"/data"', f'"{place / "store"}"'))
        routes = ",".join(f"nats://127.0.0.1:{port}" for port in self._routes)
        with (place / "log").open("ab") as log:
            self._processes[name] = await asyncio.create_subprocess_exec(
                *(find_binary(), "--config", str(config), "--addr", "127.0.0.1"),
                *("--port", str(self._clients[number]), "--http_port", str(self._monitors[number])),
                *("--cluster", f"nats://127.0.0.1:{self._routes[number]}", "--routes", routes),
                *("--pid", str(place / "pid")),
                env={**os.environ, "POD_NAME": name, "NATS_USER": LOGIN.user, "NATS_PASSWORD": LOGIN.password},
                stdout=log,
                stderr=log,
            )

    async def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        process = self._processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        await process.wait()

    async def stop(self) -> None:
        for name in list(self._processes):
            await self.kill(name)


@contextlib.asynccontextmanager
async def running_cluster(directory: Path, servers: int = 3) -> AsyncIterator[Cluster]:
    """A cluster of which so many servers have been started; they may not have found each other yet."""
    cluster = Cluster(directory, _free_ports(9))
    try:
        for number in range(servers):
            await cluster.start(f"nats-{number}")
        yield cluster
    finally:
        await cluster.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
