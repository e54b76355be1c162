"""Runs a whole mesh on one machine: nats-server, then the services, each kept running until all are stopped.

| waits for | does |
|---|---|
| the lock of the data directory | ends what a killed supervisor left, starts nats-server, then all services at once |
| every service: ready in the `replicas` bucket, and 200 from /healthz | lets the block of `running` begin |
| a process that ends | starts it again after a growing delay; nats-server on the same port |
| the end of the block | SIGTERM to all services, SIGKILL to the late, then nats-server |

What it knows stands in the state file at any moment. It keeps nothing else: jobs live in the nats store and the blobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial

from services.local.config import DEFAULT_PORT, Paths, ServiceCommand, Setting, write_toml
from services.local.endings import finish
from services.local.health import Observer
from services.local.logs import rotate
from services.local.machine import check_port, readable, store_limit, streams_size, tree_size
from services.local.nats_server import NatsServer
from services.local.orphans import end_orphans
from services.local.processes import Child, Process, Program, guarded, spawn, stop_all
from services.local.state import MeshState, Phase, held_lock, read_state, write_state
from shared.blobs import BlobStore
from shared.bus import Bus
from shared.errors import PermanentError
from shared.tasks import Tasks, cancelled

NATS = "nats-server"
START_SECONDS = 900.0
"""A sampler that compiles its model for a large GPU takes minutes."""
REMIND_SECONDS = 10.0
"""How often to say what a slow start waits for."""
STARTING_INTERVAL = 0.1
RUNNING_INTERVAL = 1.0
"""Seconds between two looks at the services."""
DRAIN_SECONDS = 8.5
"""What services have to finish: a little more than their own `drain_seconds`."""
NATS_STOP_SECONDS = 1.0

Tell = Callable[[str], None]


class Supervisor:
    """The mesh of one data directory."""

    def __init__(
        self,
        paths: Paths,
        commands: Sequence[ServiceCommand],
        *,
        port: int = DEFAULT_PORT,
        tell: Tell,
        start_seconds: float = START_SECONDS,
        prepare: Callable[[Bus], Awaitable[None]] | None = None,
    ) -> None:
        """`port` is the bus's, 0 for a free one. `tell` is given what people should know, a line at a time.

        `prepare` is awaited when all services are ready, before the mesh counts as such.
        """
        self.nats_url = ""
        self._paths = paths
        self._commands = commands
        self._port = port
        self._tell = tell
        self._start_seconds = start_seconds
        self._prepare = prepare
        self._started = time.time()
        self._phase: Phase = "starting"
        self._tasks = Tasks("supervisor")
        self._children: list[Child] = []
        """nats-server first."""
        self._keepers: list[asyncio.Task[None]] = []
        self._observing: asyncio.Task[None] | None = None
        self._bus: Bus | None = None

    @property
    def state(self) -> MeshState:
        """What the state file says."""
        return MeshState(
            pid=os.getpid(),
            data=str(self._paths.root),
            started=self._started,
            phase=self._phase,
            nats_url=self.nats_url,
            blob_url=str(self._paths.blobs),
            services=[child.state for child in self._children],
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Bus]:
        """The mesh, ready for work, and a connection to it; stopped at the end of the block.

        Raise `UserError` if the directory or the port is in use, or a service cannot work as it is configured, and
        `PermanentError` if a service does not come up.
        """
        self._paths.make()
        with held_lock(self._paths):
            try:
                yield await self._start()
            finally:
                await finish(self._stop())

    async def wait(self) -> None:
        """Wait until the supervisor itself fails, and raise why. A service that fails is no reason."""
        await self._tasks.wait()

    # -- start ---------------------------------------------------------------------------------------------------

    async def _start(self) -> Bus:
        if (before := read_state(self._paths)) is not None:
            await asyncio.to_thread(end_orphans, before.services, self._tell)
        check_port(self._port)
        await self._start_nats()
        self._bus = await Bus.connect(self.nats_url, BlobStore(str(self._paths.blobs)), name="supervisor")
        for command in self._commands:
            self._start_service(command)
        await self._unless_failed(self._all_ready(self._bus))
        if self._prepare is not None:
            await self._prepare(self._bus)
        self._observing = self._tasks.start("observe", self._observe(self._bus))
        self._become("ready")
        return self._bus

    async def _start_nats(self) -> None:
        limit = store_limit(self._paths.nats)
        free = shutil.disk_usage(self._paths.nats).free
        if free + tree_size(self._paths.nats) < streams_size():
            self._tell(f"only {readable(free)} of disk are free; the bus alone may need {readable(streams_size())}")
        server = await self._nats_server(limit)
        self.nats_url, self._port = server.url, server.port
        self._tell(f"{NATS} is ready at {server.url}")

        async def again() -> Process:
            return (await self._nats_server(limit)).process

        self._keep(
            Program(
                name=NATS,
                service=NATS,
                launch=again,
                log=self._paths.nats / "nats.log",
                marker=str(self._paths.nats / "nats.conf"),
                port=server.port,
            ),
            server.process,
        )

    async def _nats_server(self, limit: int) -> NatsServer:
        rotate(self._paths.nats / "nats.log")
        wrap = partial(guarded, last_signal=signal.SIGTERM)
        return await NatsServer.start(self._paths.nats, port=self._port or -1, max_store_bytes=limit, wrap=wrap)

    def _start_service(self, command: ServiceCommand) -> None:
        config, output = self._paths.configs / f"{command.name}.toml", self._paths.log(command.name)
        common: dict[str, Setting] = {
            "nats_url": self.nats_url,
            "blob_url": str(self._paths.blobs),
            "replica": command.name,
            "metrics_port": 0,
            "log_level": "INFO",
        }
        write_toml(config, common | dict(command.config))
        model = command.config.get("base_model")
        self._keep(
            Program(
                name=command.name,
                service=command.service,
                launch=partial(spawn, command, config, output),
                log=output,
                marker=str(config),
                base_model=str(model) if model else None,
            )
        )

    def _keep(self, program: Program, running: Process | None = None) -> None:
        child = Child(program, tell=self._tell, changed=self._save)
        self._children.append(child)
        self._keepers.append(self._tasks.start(program.name, child.keep(running)))

    async def _unless_failed(self, work: Coroutine[None, None, None]) -> None:
        """Do the work, or raise what makes the supervisor itself fail meanwhile."""
        working, failing = asyncio.ensure_future(work), asyncio.ensure_future(self._tasks.wait())
        try:
            await asyncio.wait([working, failing], return_when=asyncio.FIRST_COMPLETED)
            (working if working.done() else failing).result()
        finally:
            await cancelled([working, failing])

    async def _all_ready(self, bus: Bus) -> None:
        now = asyncio.get_running_loop().time
        give_up, remind = now() + self._start_seconds, now() + REMIND_SECONDS
        async with Observer(bus) as observer:
            while waiting := [child.name for child in self._children[1:] if not child.ever_ready]:
                for child in self._children:
                    child.check_start()
                if now() > give_up:
                    raise PermanentError(f"not ready after {self._start_seconds:.0f} s: {', '.join(waiting)}")
                if now() > remind:
                    remind = now() + REMIND_SECONDS
                    self._tell(f"waiting for {', '.join(waiting)}")
                await observer.look(self._children[1:])
                await asyncio.sleep(STARTING_INTERVAL)

    # -- while it runs -------------------------------------------------------------------------------------------

    async def _observe(self, bus: Bus) -> None:
        async with Observer(bus) as observer:
            while True:
                await asyncio.sleep(RUNNING_INTERVAL)
                await observer.look(self._children[1:])
                for command in self._commands:
                    rotate(self._paths.log(command.name))

    def _become(self, phase: Phase) -> None:
        self._phase = phase
        self._save()

    def _save(self) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the mesh; the next change writes it again
            write_state(self._paths, self.state)

    # -- stop ----------------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        if self._children:
            self._become("stopping")
            self._tell("stopping")
        if self._observing is not None:
            await cancelled([self._observing])
        await stop_all(self._children[1:], self._keepers[1:], DRAIN_SECONDS)
        if self._bus is not None:
            await self._bus.close()
        await stop_all(self._children[:1], self._keepers[:1], NATS_STOP_SECONDS)
        await self._tasks.stop()
        self._paths.state.unlink(missing_ok=True)
