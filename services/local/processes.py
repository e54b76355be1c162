"""Processes that are kept running: started again after a growing delay when they end, ended together with their kin."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.local.config import ServiceCommand
from services.local.logs import last_error, rotate
from services.local.state import Condition, ServiceState
from shared.errors import PermanentError, UserError
from shared.process import USER_ERROR_EXIT

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
SETTLED_SECONDS = 30.0
"""Whoever was ready for so long starts anew with the shortest delay."""
START_TRIES = 3
"""Ends before it was ever ready, after which starting the mesh is given up."""
LAST_RESORT_SECONDS = 1.0
"""How long the kernel may take for a SIGKILL."""

Process = asyncio.subprocess.Process
Launch = Callable[[], Awaitable[Process]]


@dataclass(frozen=True)
class Program:
    """What is to be kept running."""

    name: str
    service: str
    launch: Launch
    log: Path
    """Where its last error is found when it ends."""
    marker: str
    """Stands in its command line (see `ServiceState`)."""
    base_model: str | None = None
    port: int | None = None
    """None: it says so itself once it runs. Otherwise `launch` returns only when it can be used there."""


class Child:
    """A program under supervision."""

    def __init__(self, program: Program, *, tell: Callable[[str], None], changed: Callable[[], None]) -> None:
        """`tell` is given a line for people, `changed` is called when `state` is another."""
        self.name = program.name
        self.condition: Condition = "starting"
        self.failures = 0
        """Ends in a row, without having been ready for a while."""
        self.ever_ready = False
        self._program = program
        self._tell = tell
        self._changed = changed
        self._stopping = asyncio.Event()
        self._process: Process | None = None
        self._log_start = 0
        self._port = program.port
        self._restarts = -1
        self._started: float | None = None
        self._ready_since: float | None = None
        self._message = ""

    @property
    def pid(self) -> int | None:
        """Of the present process."""
        return self._process.pid if self._process else None

    @property
    def state(self) -> ServiceState:
        """For the state file."""
        return ServiceState(
            name=self.name,
            service=self._program.service,
            condition=self.condition,
            pid=self.pid,
            port=self._port,
            marker=self._program.marker,
            restarts=max(self._restarts, 0),
            started=self._started,
            message=self._message,
            base_model=self._program.base_model,
        )

    async def keep(self, running: Process | None = None) -> None:
        """Keep it running until `stop`. `running` is taken over if given. Ends early if it asks not to be restarted."""
        while not self._stopping.is_set():
            code = await self._run(running)
            running = None
            if self._stopping.is_set():
                break
            if code == USER_ERROR_EXIT:
                self._tell(f"{self.name} cannot work as it is configured: {self._message}")
                return self._become("failed")
            await self._pause()
        return self._become("stopped")

    def seen(self, pid: int | None, *, ready: bool, port: int | None) -> None:
        """Note what was observed of the process `pid`."""
        if self._process is None or pid != self._process.pid:
            return
        self._port = port or self._port
        if ready and self.condition != "ready":
            if not self.ever_ready:
                self._tell(f"{self.name} is ready after {time.time() - (self._started or 0):.1f} s")
            self._ready()
        elif not ready and self.condition == "ready":
            self._ready_since = None
            self._become("unhealthy")

    def check_start(self) -> None:
        """Raise what the start of the mesh fails with if this process cannot be got going."""
        if self.condition == "failed":
            raise UserError(f"{self.name}: {self._message}")
        if self.failures >= START_TRIES and not self.ever_ready:
            raise PermanentError(
                f"{self.name} ended {self.failures} times while starting: {self._message} (log: {self._program.log})"
            )

    def stop(self) -> None:
        """Ask it to end, and do not start it again."""
        self._stopping.set()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and what it started."""
        if self._process is not None:
            kill_group(self._process.pid)

    async def _run(self, running: Process | None) -> int:
        """One life. Returns its exit code; 1 if it could not even be started."""
        log = self._program.log
        self._restarts += 1
        self._log_start = log.stat().st_size if log.exists() else 0
        try:
            self._process = running or await self._program.launch()
        except (UserError, OSError) as error:
            self._message = str(error)
            return 1
        if self._stopping.is_set():
            self.stop()
        self._started = time.time()
        if self._program.port is None:
            self._become("starting")
        else:
            self._ready()
        code = await self._process.wait()
        kill_group(self._process.pid)  # whatever it started and left behind
        self._process = None
        # What it wrote before somebody killed it is not why it ended.
        self._message = (last_error(log, self._log_start) if code >= 0 else "") or describe_exit(code)
        return code

    async def _pause(self) -> None:
        """Wait before the next life."""
        if self._ready_since is not None and time.monotonic() - self._ready_since >= SETTLED_SECONDS:
            self.failures = 0
        self._ready_since = None
        self.failures += 1
        delay = restart_delay(self.failures)
        self._tell(f"{self.name} ended: {self._message}. It is started again in {delay:g} s")
        self._become("waiting")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay)

    def _ready(self) -> None:
        self.ever_ready = True
        self._ready_since = time.monotonic()
        self._become("ready")

    def _become(self, condition: Condition) -> None:
        self.condition = condition
        self._changed()


def restart_delay(failures: int) -> float:
    """Seconds to wait after so many ends in a row."""
    doublings = min(failures - 1, 16)
    return min(FIRST_DELAY * 2.0**doublings, LONGEST_DELAY)


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def guarded(argv: Sequence[str], last_signal: signal.Signals = signal.SIGKILL) -> list[str]:
    """The command, made to be sent `last_signal` when this process ends (see `services.local.guard`)."""
    guard = str(Path(__file__).with_name("guard.py"))
    # Isolated and without site-packages: it starts in a few milliseconds and reads nothing of the user's.
    return [sys.executable, "-I", "-S", guard, str(os.getpid()), str(int(last_signal)), *argv]


CHILD_ENVIRONMENT = {
    "TQDM_DISABLE": "1",  # progress bars are no lines of a log
    # A sampler and a trainer share the cores. OpenMP's threads by default wait actively, which makes two engines on
    # the same cores several times slower than one after the other; so each may use all cores, and waits passively.
    "OMP_WAIT_POLICY": "PASSIVE",
}


async def spawn(command: ServiceCommand, config: Path, log: Path) -> Process:
    """Start a service in a session of its own, so that the terminal's Ctrl-C goes to the supervisor alone."""
    rotate(log)
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *guarded([*command.argv, "--config", str(config)]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**CHILD_ENVIRONMENT, **os.environ, **command.environment},
        )


def kill_group(leader: int) -> None:
    """End every process of a group that we started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


async def stop_all(children: Sequence[Child], keepers: Sequence[asyncio.Task[None]], patience: float) -> None:
    """End all at once: they are asked first, and made to after `patience` seconds."""
    for child in children:
        child.stop()
    if not keepers:
        return
    _, late = await asyncio.wait(keepers, timeout=patience)
    if late:
        for child in children:
            child.kill()
        await asyncio.wait(late, timeout=LAST_RESORT_SECONDS)
