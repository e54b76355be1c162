"""What is running on a data directory: the lock that one supervisor holds, and the state file that it writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from services.local.config import Paths
from shared.errors import UserError

LOCK_PATIENCE = 1.0
"""Seconds to try for: whoever only looks whether the lock is held holds it for a moment."""

Phase = Literal["starting", "ready", "stopping"]
Condition = Literal["starting", "ready", "unhealthy", "waiting", "failed", "stopped"]
"""Of a service. `unhealthy`: it was ready and is not now; `waiting`: it ended and will be started again; `failed`: it
ended, and starting it again would not help."""


class ServiceState(msgspec.Struct, frozen=True, kw_only=True):
    """One supervised process."""

    name: str
    service: str
    condition: Condition = "starting"
    pid: int | None = None
    port: int | None = None
    """Where it serves /healthz and /metrics; for nats-server, where clients connect."""
    marker: str = ""
    """Stands in its command line, so that the process with this id can be known for ours."""
    restarts: int = 0
    started: float | None = None
    """Seconds since 1970."""
    message: str = ""
    """Why it ended the last time."""
    base_model: str | None = None


class MeshState(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh as its supervisor last described it."""

    pid: int
    data: str
    started: float
    phase: Phase = "starting"
    nats_url: str = ""
    blob_url: str = ""
    message: str = ""
    services: list[ServiceState] = []


def write_state(paths: Paths, state: MeshState) -> None:
    """Replace the state file at once: a reader sees the old one or the new one."""
    replace_file(paths.state, msgspec.json.format(msgspec.json.encode(state), indent=2))


def read_state(paths: Paths) -> MeshState | None:
    """What the last supervisor wrote; None if there is nothing, or nothing readable."""
    try:
        return msgspec.json.decode(paths.state.read_bytes(), type=MeshState)
    except (OSError, msgspec.DecodeError):
        return None


def running_state(paths: Paths) -> MeshState | None:
    """The state of a mesh that runs at this moment, or None."""
    return read_state(paths) if lock_holder(paths) is not None else None


def require_running(paths: Paths) -> MeshState:
    """The state of the running mesh, with its bus up. Raise `UserError` if there is none."""
    state = running_state(paths)
    if state is None:
        raise UserError(f"no mesh is running on {paths.root}: start one with `openrl up`, or name another with --data")
    if not state.nats_url:
        raise UserError(f"the mesh on {paths.root} is still starting: try again in a moment")
    return state


@contextlib.contextmanager
def held_lock(paths: Paths) -> Iterator[None]:
    """Hold the data directory. Raise `UserError` naming the process that holds it already.

    The kernel lets go of the lock when the process ends, however it ends, so there are no stale ones.
    """
    with paths.lock.open("a+") as file:
        if not _try_lock(file.fileno(), LOCK_PATIENCE):
            holder = lock_holder(paths)
            raise UserError(
                f"a mesh is already running on {paths.root} (process {holder or 'unknown'}): "
                "end it with `openrl down`, or choose another directory with --data"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def lock_holder(paths: Paths) -> int | None:
    """Process id of the supervisor that holds the data directory; 0 if it has not said yet, None if there is none."""
    try:
        with paths.lock.open("r") as file:
            if _try_lock(file.fileno(), 0, shared=True):
                return None
            text = file.read()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() else 0


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def _try_lock(file: int, patience: float, *, shared: bool = False) -> bool:
    give_up = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(0.02)
        else:
            return True
