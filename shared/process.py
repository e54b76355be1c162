"""A service as an operating-system process, or inside another one.

`main` is all that `services/<name>/__main__.py` calls. SIGTERM or Ctrl-C drains: nothing new is taken, what runs may
finish, the rest is handed back. A task that fails brings the process down with exit code 1, to be started again; a
configuration that cannot work ends it with exit code 2 and a message, since starting it again would not help.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from shared import config as configuration
from shared import observe, topology
from shared.blobs import BlobStore
from shared.bus import Bus, Login
from shared.config import ServiceConfig
from shared.contracts.replicas import ReplicaRecord
from shared.errors import MeshError, UserError
from shared.node import Node, Service
from shared.tasks import Tasks
from shared.worker import WorkerMetrics

log = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=ServiceConfig)
Build = Callable[[ConfigT, Node], Service]

PRESENCE_SECONDS = 2.0
USER_ERROR_EXIT = 2


def main(
    service: str,
    kind: type[ConfigT],
    build: Build[ConfigT],
    *,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    """Run a service until it is told to stop. Does not return.

    `loop_factory` makes its event loop. None: asyncio's own.
    """
    parser = argparse.ArgumentParser(prog=f"python -m services.{service}")
    parser.add_argument("--config", type=Path, help="TOML file; OPENRL_" + service.upper() + "_* goes before it")
    arguments = parser.parse_args()
    try:
        config = configuration.load(kind, service, arguments.config)
        observe.log_as_json(service, replica_name(service, config), config.log_level)
        observe.log_what_nobody_caught()
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_until_stopped(service, config, build))
    except UserError as error:
        if not logging.getLogger().handlers:
            observe.log_as_json(service, "", "INFO")
        log.error("%s", error)
        sys.exit(USER_ERROR_EXIT)


@contextlib.asynccontextmanager
async def running(service: str, config: ConfigT, build: Build[ConfigT]) -> AsyncIterator[tuple[Service, Node]]:
    """A started service inside this process; stopped at the end of the block."""
    replica = replica_name(service, config)
    blobs = BlobStore(config.blob_url)
    telemetry = observe.Telemetry(service, replica)
    port = await telemetry.serve(config.host, config.metrics_port)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(telemetry.close)
        login = Login(config.nats_user, config.nats_password, config.nats_credentials, config.nats_ca)
        bus = await Bus.connect(config.nats_url, blobs, name=replica, replicas=config.stream_replicas, login=login)
        telemetry.alive = lambda: None if bus.usable else "the connection to the bus is closed for good"
        stack.push_async_callback(bus.close)
        tasks = Tasks(replica)
        stack.push_async_callback(tasks.stop)
        node = Node(
            service=service,
            replica=replica,
            bus=bus,
            blobs=blobs,
            telemetry=telemetry,
            worker_metrics=WorkerMetrics(telemetry.registry),
            tasks=tasks,
            drain_seconds=config.drain_seconds,
        )
        running_service = build(config, node)
        if running_service.base_model is not None:
            telemetry.registry.labels["base_model"] = running_service.base_model
        presence = Presence(node, running_service, config.host, port)
        stack.push_async_callback(presence.leave)
        await presence.announce()
        tasks.start("presence", presence.keep())
        stack.push_async_callback(running_service.stop)
        await running_service.start()
        presence.ready = True
        telemetry.healthy = lambda: None if bus.connected else "not connected to the bus"
        await presence.announce()
        log.info("%s is ready", replica)
        yield running_service, node
        telemetry.healthy = lambda: "stopping"


def replica_name(service: str, config: ServiceConfig) -> str:
    """Name of this process in the mesh."""
    return config.replica or f"{service}-{socket.gethostname()}-{os.getpid()}"


class Presence:
    """Keeps a replica's entry in the `replicas` bucket alive."""

    def __init__(self, node: Node, service: Service, host: str, port: int) -> None:
        self.ready = False
        self._node = node
        self._service = service
        self._host = host
        self._port = port
        self._started = time.time()
        self._table = node.bus.table(topology.REPLICAS)

    async def announce(self) -> None:
        """Write the entry now."""
        record = ReplicaRecord(
            replica=self._node.replica,
            service=self._node.service,
            pid=os.getpid(),
            host=self._host,
            metrics_port=self._port,
            activity=self._service.activity() if self.ready else "starting",
            ready=self.ready,
            base_model=self._service.base_model,
            started=self._started,
            offers=list(self._service.offers),
        )
        await self._table.put(self._node.replica, record)

    async def keep(self) -> None:
        """Renew the entry for ever."""
        while True:
            await asyncio.sleep(PRESENCE_SECONDS)
            try:
                await self.announce()
            except MeshError as error:
                log.warning("presence cannot be announced: %s", error)

    async def leave(self) -> None:
        """Take the entry away; if the bus is gone, it goes away by itself."""
        if not self._node.bus.connected:
            return
        with contextlib.suppress(MeshError):
            await self._table.delete(self._node.replica)


async def _until_stopped(service: str, config: ConfigT, build: Build[ConfigT]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    starting = asyncio.create_task(_run(service, config, build, stop))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    await starting


async def _run(service: str, config: ConfigT, build: Build[ConfigT], stop: asyncio.Event) -> None:
    async with running(service, config, build) as (_, node):
        stopping = asyncio.create_task(stop.wait())
        failing = asyncio.create_task(node.tasks.wait())
        await asyncio.wait([stopping, failing], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if failing.done():
            failing.result()
        failing.cancel()
        log.info("stopping")
