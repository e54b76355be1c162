"""Runs the command line and meshes of stand-ins for the tests of `services.local`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from services.local.config import Paths
from services.local.state import MeshState, ServiceState, read_state, running_state
from services.local.supervisor import Supervisor
from shared.bus import Bus
from tests.mesh.stand_in import commands, up_argv

WAIT_SECONDS = 30.0
"""Generous: these tests share their cores with others."""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def run(*argv: str, given: str = "", cwd: Path | None = None) -> Outcome:
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(given.encode()), 2 * WAIT_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Outcome(process.returncode or 0, out.decode(), err.decode())


async def openrl(paths: Paths, *arguments: str, given: str = "", cwd: Path | None = None) -> Outcome:
    """A command on this data directory."""
    return await run(
        sys.executable, "-m", "services.local", *arguments, "--data", str(paths.root), given=given, cwd=cwd
    )


async def eventually(condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Wait until the condition holds."""
    give_up = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < give_up, f"after {seconds:.0f} s still not: {what}"
        await asyncio.sleep(0.02)


class Mesh:
    """A mesh of stand-ins in this process, and what it told."""

    def __init__(self, paths: Paths, *modes: str, port: int = 0) -> None:
        self.paths = paths
        self.told: list[str] = []
        self.supervisor = Supervisor(paths, commands(paths, *modes), port=port, tell=self.told.append)

    def service(self, name: str) -> ServiceState:
        return service(self.supervisor.state, name)


@contextlib.asynccontextmanager
async def running(mesh: Mesh) -> AsyncIterator[Bus]:
    async with mesh.supervisor.running() as bus:
        yield bus


class UpProcess:
    """`openrl up` with stand-ins, as a process of its own."""

    def __init__(self, paths: Paths, process: asyncio.subprocess.Process) -> None:
        self.paths = paths
        self.process = process

    @property
    def state(self) -> MeshState:
        state = read_state(self.paths)
        assert state is not None
        return state

    async def ready(self) -> MeshState:
        def is_ready() -> bool:
            assert self.process.returncode is None, "it ended instead"
            state = running_state(self.paths)
            return state is not None and state.pid == self.process.pid and state.phase == "ready"

        await eventually(is_ready, "the mesh is ready")
        return self.state


@contextlib.asynccontextmanager
async def up_process(paths: Paths, *modes: str, port: int = 0) -> AsyncIterator[UpProcess]:
    process = await asyncio.create_subprocess_exec(
        *up_argv(paths, port, *modes), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield UpProcess(paths, process)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), WAIT_SECONDS)


def service(state: MeshState, name: str) -> ServiceState:
    return next(service for service in state.services if service.name == name)


def pids(state: MeshState) -> list[int]:
    return [service.pid for service in state.services if service.pid]


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
