"""`openrl up --prometheus`: it finds the mesh's services wherever they listen, and is kept running like them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.local.config import Paths
from services.local.prometheus import Prometheus
from services.local.supervisor import Supervisor
from shared.errors import UserError
from tests.mesh import harness
from tests.mesh.local_runs import eventually, openrl, service
from tests.mesh.prometheus_api import Api, need_prometheus
from tests.mesh.stand_in import commands


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths.of(tmp_path / "data")


@contextlib.asynccontextmanager
async def watched(paths: Paths, *modes: str) -> AsyncIterator[tuple[Supervisor, Api]]:
    need_prometheus()
    paths.make()
    beside = Prometheus(paths, port=0)
    supervisor = Supervisor(paths, commands(paths, *modes), port=0, tell=lambda _: None, prometheus=beside)
    async with supervisor.running():
        yield supervisor, Api(beside.url)


async def scraped(api: Api, instance: str) -> str:
    """The address at which a service is scraped with success."""

    async def look() -> str | None:
        found = await api.query(
            f'process_start_time_seconds{{instance="{instance}", service="stand_in", job="openrl"}}'
        )
        return found[0]["value"][1] if found else None

    return await harness.eventually(look)


async def test_services_are_scraped_by_their_names_and_found_again_at_another_port(paths: Paths) -> None:
    async with watched(paths, "fine", "fine") as (supervisor, api):
        first = await scraped(api, "stand-in-0")
        await scraped(api, "stand-in-1")
        pid = service(supervisor.state, "stand-in-0").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

        async def another() -> str | None:
            found = await scraped(api, "stand-in-0")
            return found if found != first else None

        await harness.eventually(another)


async def test_status_shows_its_address(paths: Paths) -> None:
    async with watched(paths, "fine") as (supervisor, _):
        shown = await openrl(paths, "status")
        assert f"prometheus  http://127.0.0.1:{service(supervisor.state, 'prometheus').port}" in shown.out
        assert shown.code == 0, shown.out


async def test_it_is_started_again_and_keeps_what_it_had(paths: Paths) -> None:
    async with watched(paths, "fine") as (supervisor, api):
        await scraped(api, "stand-in-0")
        pid = service(supervisor.state, "prometheus").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: service(supervisor.state, "prometheus").pid not in (None, pid), "another process")
        await eventually(lambda: service(supervisor.state, "prometheus").condition == "ready", "ready again")
        await scraped(api, "stand-in-0")
        assert service(supervisor.state, "prometheus").restarts == 1
        log = await openrl(paths, "logs", "prometheus")
        assert "Server is ready to receive web requests" in log.out


async def test_it_is_gone_with_the_mesh(paths: Paths) -> None:
    async with watched(paths, "fine") as (supervisor, _):
        pid = service(supervisor.state, "prometheus").pid
        assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_prometheus_the_error_says_how_to_get_it(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match="apt-get install prometheus"):
        Prometheus(paths)


def test_a_taken_port_is_named(paths: Paths) -> None:
    need_prometheus()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=f"port {port} on 127.0.0.1 is in use: choose another with --prometheus-port"
        ):
            Prometheus(paths, port=port)
