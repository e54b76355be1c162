"""What `openrl up` and `down` do around the supervisor: signals, the background, the way down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from services.local import aliases, keys
from services.local.config import Paths, ServiceCommand
from services.local.orphans import end_orphans
from services.local.placed import Placeable
from services.local.prometheus import Prometheus
from services.local.state import held_lock, lock_holder, read_state, running_state
from services.local.supervisor import Supervisor, Tell
from services.local.up import Up
from shared.bus import Bus
from shared.errors import PermanentError
from shared.observe import JsonFormatter

T = TypeVar("T")

SUPERVISOR = "supervisor"
DOWN_SECONDS = 15.0
"""A supervisor takes ten; then it is ended."""
POLL_SECONDS = 0.05

log = logging.getLogger(__name__)


def run_up(wish: Up, *, echo: Tell) -> None:
    """Run a mesh until SIGTERM or Ctrl-C. Raise as `Supervisor.running`."""
    wish.paths.make()
    keys.ensure_secret(wish.paths)
    beside = Prometheus(wish.paths, port=wish.prometheus_port) if wish.prometheus_port is not None else None

    async def invite(bus: Bus) -> None:
        await aliases.tell(bus, wish.paths)
        key, url = await keys.ensure_default(bus, wish.paths), await keys.gateway_url(bus)
        if beside is not None:
            echo(f"Prometheus answers at {beside.url}")
        if url is not None:
            echo("clients reach the gateway with")
            for line in keys.client_lines(url, key):
                echo(line)  # a key does not belong into a log

    run_commands(
        wish.paths,
        wish.commands(beside),
        port=wish.port,
        echo=echo,
        prepare=invite,
        prometheus=beside,
        placeable=wish.placeable,
    )


def run_commands(
    paths: Paths,
    commands: Sequence[ServiceCommand],
    *,
    port: int,
    echo: Tell,
    prepare: Callable[[Bus], Awaitable[None]] | None = None,
    prometheus: Prometheus | None = None,
    placeable: Placeable | None = None,
) -> None:
    """Run these services until SIGTERM or Ctrl-C; the rest is as in `Supervisor`. Raise as `Supervisor.running`."""
    paths.make()
    tell = told_and_logged(paths, echo)

    async def stay() -> None:
        supervisor = Supervisor(
            paths, commands, port=port, tell=tell, prepare=prepare, prometheus=prometheus, placeable=placeable
        )
        async with supervisor.running():
            tell(f"the mesh is ready on {paths.root} at {supervisor.nats_url}; Ctrl-C or `openrl down` ends it")
            await supervisor.wait()

    until_signal(stay())


def until_signal(work: Coroutine[Any, Any, T]) -> T | None:
    """Run `work`; SIGTERM or Ctrl-C cancels it, so that it can clean up. None: it was cancelled."""
    return asyncio.run(_cancelled_by_signal(work))


async def _cancelled_by_signal(work: Coroutine[Any, Any, T]) -> T | None:
    task = asyncio.ensure_future(work)
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not signals:
            raise
        return None


def told_and_logged(paths: Paths, echo: Tell) -> Tell:
    """Tell people, and write the same, with whatever else this process logs, to the supervisor's log."""
    handler = logging.FileHandler(paths.log(SUPERVISOR))
    handler.setFormatter(JsonFormatter(SUPERVISOR, SUPERVISOR))
    logging.basicConfig(level="INFO", handlers=[handler], force=True)

    def tell(text: str) -> None:
        log.info("%s", text)
        echo(text)

    return tell


def run_detached(paths: Paths, argv: Sequence[str], *, echo: Tell) -> int:
    """Start `argv` (an `up` without --detach) in the background and wait until the mesh is ready.

    What it prints is passed on. Returns 0, or the exit code that it ended with.
    """
    paths.make()
    # A file of its own until it is ready: another mesh may run here, or somebody else start one at the same time.
    number, name = tempfile.mkstemp(prefix=f"{paths.detached.name}.", dir=paths.root)
    output_path = Path(name)
    with os.fdopen(number, "wb") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    printed = Printed(output_path, echo)
    while process.poll() is None:
        printed.more()
        if (state := running_state(paths)) and state.pid == process.pid and state.phase == "ready":
            printed.more()
            process.returncode = 0  # it stays; nobody waits for it any more
            output_path.replace(paths.detached)
            return 0
        time.sleep(POLL_SECONDS)
    printed.more()
    output_path.unlink()
    return process.returncode


class Printed:
    """Passes on what is appended to a file."""

    def __init__(self, path: Path, echo: Tell) -> None:
        self._path = path
        self._echo = echo
        self._place = 0

    def more(self) -> None:
        """Pass on the whole lines that have come since."""
        raw = self._path.read_bytes()[self._place :]
        whole = raw[: raw.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._echo(line)


def take_down(paths: Paths, *, echo: Tell) -> None:
    """End the mesh that runs on a data directory, and what a killed supervisor left there.

    Raise `PermanentError` if it does not end.
    """
    pid = lock_holder(paths)
    if pid is None:
        _end_leftovers(paths, echo)
        return
    if not pid or not _ended(paths, pid, signal.SIGTERM, DOWN_SECONDS):
        echo(f"supervisor {pid} did not end in {DOWN_SECONDS:.0f} s: it is killed")
        if not pid or not _ended(paths, pid, signal.SIGKILL, DOWN_SECONDS):
            raise PermanentError(f"the supervisor of {paths.root} (process {pid}) cannot be ended")
        _end_leftovers(paths, echo)
    echo(f"the mesh on {paths.root} is down")


def _end_leftovers(paths: Paths, echo: Tell) -> None:
    state = read_state(paths)
    if state is None:
        echo(f"no mesh is running on {paths.root}")
        return
    with held_lock(paths):
        end_orphans(state.services, echo)
        paths.state.unlink(missing_ok=True)
    echo(f"the supervisor of {paths.root} (process {state.pid}) was killed before; nothing of its mesh runs any more")


def _ended(paths: Paths, pid: int, number: signal.Signals, patience: float) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    give_up = time.monotonic() + patience
    while lock_holder(paths) is not None:
        if time.monotonic() > give_up:
            return False
        time.sleep(POLL_SECONDS)
    return True
