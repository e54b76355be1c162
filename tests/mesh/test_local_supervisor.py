"""The supervisor with stand-in services: readiness, restarts, one mesh a directory, the ways down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.local.config import Paths
from services.local.lifecycle import run_detached
from services.local.processes import START_TRIES
from services.local.state import MeshState, ServiceState, lock_holder, read_state, write_state
from shared import topology
from shared.contracts.jobs import JobChanged
from shared.errors import PermanentError, UserError
from tests.mesh.local_runs import (
    Mesh,
    alive,
    eventually,
    openrl,
    pids,
    run,
    running,
    service,
    up_process,
)
from tests.mesh.stand_in import up_argv

SLEEP = "import time; print(flush=True); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths.of(tmp_path / "data")


async def test_status_shows_every_service_ready_with_its_process_and_port(paths: Paths) -> None:
    mesh = Mesh(paths, "fine", "fine")
    async with running(mesh):
        outcome = await openrl(paths, "status", "--json")
        shown = await openrl(paths, "status")
    answer = outcome.json
    assert (outcome.code, answer["running"], answer["phase"]) == (0, True, "ready")
    assert answer["nats_url"] == mesh.supervisor.nats_url
    assert [item["name"] for item in answer["services"]] == ["nats-server", "stand-in-0", "stand-in-1"]
    assert {item["state"] for item in answer["services"]} == {"ready"}
    assert all(item["pid"] and item["port"] and item["uptime_s"] >= 0 for item in answer["services"])
    assert answer["services"][1]["activity"] == "standing in"
    assert answer["disk"]["free"] > 0
    assert "stand-in-1" in shown.out
    assert shown.code == 0


async def test_status_without_a_mesh_says_so(paths: Paths) -> None:
    outcome = await openrl(paths, "status", "--json")
    assert (outcome.code, outcome.json["running"]) == (1, False)


async def test_a_killed_service_is_started_again(paths: Paths) -> None:
    mesh = Mesh(paths, "fine", "fine")
    async with running(mesh):
        before = mesh.service("stand-in-0")
        other = mesh.service("stand-in-1").pid
        assert before.pid is not None
        os.kill(before.pid, signal.SIGKILL)
        await eventually(lambda: mesh.service("stand-in-0").pid not in (None, before.pid), "another process")
        await eventually(lambda: mesh.service("stand-in-0").condition == "ready", "ready again")
        assert mesh.service("stand-in-0").restarts == 1
        assert "killed by SIGKILL" in mesh.service("stand-in-0").message
        assert mesh.service("stand-in-1").pid == other
        assert any("stand-in-0 ended: killed by SIGKILL" in line for line in mesh.told)
        stored = read_state(paths)
        assert stored is not None
        assert service(stored, "stand-in-0").restarts == 1


async def test_a_killed_nats_server_comes_back_on_its_port_with_its_messages(paths: Paths) -> None:
    mesh = Mesh(paths, "fine")
    async with running(mesh) as bus:
        place = await bus.publish(topology.JOB_PHASES, JobChanged(job="a", phase="queued"), job="a")
        url, pid = mesh.supervisor.nats_url, mesh.service("nats-server").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert await bus.publish(topology.JOB_PHASES, JobChanged(job="b", phase="queued"), job="b") > place
        assert mesh.supervisor.nats_url == url
        assert mesh.service("nats-server").restarts == 1
        assert mesh.service("stand-in-0").restarts == 0
        assert await bus.last_place(topology.JOB_PHASES, job="a") == place


async def test_what_is_on_the_bus_is_there_at_the_next_start(paths: Paths) -> None:
    async with running(Mesh(paths)) as bus:
        place = await bus.publish(topology.JOB_PHASES, JobChanged(job="a", phase="queued"), job="a")
    async with running(Mesh(paths)) as bus:
        assert await bus.last_place(topology.JOB_PHASES, job="a") == place


async def test_a_second_up_on_a_directory_names_the_first(paths: Paths) -> None:
    async with running(Mesh(paths)):
        outcome = await run(*up_argv(paths, 0))
        assert outcome.code == 2
        assert f"already running on {paths.root} (process {os.getpid()})" in outcome.err
    assert lock_holder(paths) is None


async def test_a_port_in_use_is_named(paths: Paths) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = await run(*up_argv(paths, port))
    assert outcome.code == 2
    assert f"port {port} on 127.0.0.1 is in use: choose another with --port" in outcome.err
    assert lock_holder(paths) is None


async def test_a_service_that_cannot_work_as_configured_ends_the_start(paths: Paths) -> None:
    outcome = await run(*up_argv(paths, 0, "fine", "wrong"))
    assert outcome.code == 2
    assert "stand-in-1: colour 'plaid' is unknown: choose red or blue" in outcome.err
    assert read_state(paths) is None


async def test_a_service_that_keeps_crashing_while_starting_ends_the_start(paths: Paths) -> None:
    mesh = Mesh(paths, "crash")
    with pytest.raises(PermanentError, match=f"ended {START_TRIES} times while starting: RuntimeError: it broke"):
        async with running(mesh):
            pass
    entries = [json.loads(line) for line in paths.log("stand-in-0").read_text().splitlines()]
    crashes = [entry for entry in entries if entry["level"] == "critical"]
    assert [(entry["service"], entry["message"]) for entry in crashes] == [("stand_in", "RuntimeError: it broke")] * 3
    assert all("Traceback" in entry["error"] for entry in crashes)


async def test_a_service_that_later_refuses_its_configuration_leaves_the_others_alone(paths: Paths) -> None:
    mesh = Mesh(paths, "once", "fine")
    async with running(mesh):
        before = mesh.service("stand-in-0").pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        await eventually(lambda: mesh.service("stand-in-0").condition == "failed", "failed")
        assert "plaid" in mesh.service("stand-in-0").message
        assert mesh.service("stand-in-1").condition == "ready"
        outcome = await openrl(paths, "status")
        assert outcome.code == 1
        assert "plaid" in outcome.out


async def test_sigterm_ends_everything_within_ten_seconds_even_a_service_that_does_not_stop(paths: Paths) -> None:
    async with up_process(paths, "fine", "stubborn") as up:
        state = await up.ready()
        up.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(up.process.wait(), 10) == 0
        assert not [pid for pid in pids(state) if alive(pid)]
    assert read_state(paths) is None


async def test_down_returns_when_everything_has_ended(paths: Paths) -> None:
    async with up_process(paths, "fine") as up:
        state = await up.ready()
        outcome = await openrl(paths, "down")
        assert (outcome.code, outcome.out) == (0, f"the mesh on {paths.root} is down\n")
        assert not [pid for pid in pids(state) if alive(pid)]
        assert await asyncio.wait_for(up.process.wait(), 10) == 0


async def test_ctrl_c_ends_everything_and_counts_as_success(paths: Paths) -> None:
    async with up_process(paths, "fine") as up:
        state = await up.ready()
        up.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(up.process.wait(), 10) == 0
        assert not [pid for pid in pids(state) if alive(pid)]


async def test_down_without_a_mesh_is_no_error(paths: Paths) -> None:
    outcome = await openrl(paths, "down")
    assert (outcome.code, outcome.out) == (0, f"no mesh is running on {paths.root}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's end")
async def test_services_do_not_outlive_a_killed_supervisor(paths: Paths) -> None:
    async with up_process(paths, "fine", "stubborn") as up:
        state = await up.ready()
        up.process.send_signal(signal.SIGKILL)
        await up.process.wait()
        await eventually(lambda: not [pid for pid in pids(state) if alive(pid)], "all have ended", seconds=5)
    assert (await openrl(paths, "status", "--json")).json["running"] is False
    down = await openrl(paths, "down")
    assert (down.code, f"the supervisor of {paths.root}" in down.out, "was killed" in down.out) == (0, True, True)
    assert (await openrl(paths, "down")).out == f"no mesh is running on {paths.root}\n"
    async with up_process(paths, "fine") as again:
        await again.ready()


@contextlib.asynccontextmanager
async def left_behind(program: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that prints a line once it is ready, as a killed supervisor may leave one."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, start_new_session=True, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def record(paths: Paths, *services: ServiceState) -> None:
    paths.make()
    write_state(paths, MeshState(pid=1, data=str(paths.root), started=0.0, services=list(services)))


async def test_up_ends_orphans_of_ours_and_nobody_else(paths: Paths) -> None:
    config = str(paths.configs / "stand-in-0.toml")
    async with left_behind(SLEEP, "--config", config) as ours, left_behind(SLEEP) as other:
        first = ServiceState(name="stand-in-0", service="stand_in", pid=ours.pid, marker=config)
        second = ServiceState(
            name="stand-in-1", service="stand_in", pid=other.pid, marker=str(paths.configs / "b.toml")
        )
        record(paths, first, second)
        async with running(Mesh(paths, "fine")):
            assert await asyncio.wait_for(ours.wait(), 5) == -signal.SIGTERM
            assert other.returncode is None


async def test_down_ends_what_a_killed_supervisor_left_even_if_it_does_not_listen(paths: Paths) -> None:
    config = str(paths.configs / "stand-in-0.toml")
    async with left_behind(DEAF, "--config", config) as ours:
        record(paths, ServiceState(name="stand-in-0", service="stand_in", pid=ours.pid, marker=config))
        assert (await openrl(paths, "down")).code == 0
        assert await asyncio.wait_for(ours.wait(), 5) == -signal.SIGKILL
    assert read_state(paths) is None


async def test_a_detached_mesh_is_ready_when_the_command_returns(paths: Paths) -> None:
    told: list[str] = []
    assert await asyncio.to_thread(run_detached, paths, up_argv(paths, 0, "fine"), echo=told.append) == 0
    try:
        assert any("the mesh is ready on" in line for line in told)
        assert (await openrl(paths, "status", "--json")).json["phase"] == "ready"
    finally:
        assert (await openrl(paths, "down")).code == 0


async def test_of_two_that_start_detached_at_once_one_is_told_of_the_other(paths: Paths) -> None:
    told: list[list[str]] = [[], []]
    codes = await asyncio.gather(
        *(asyncio.to_thread(run_detached, paths, up_argv(paths, 0, "fine"), echo=lines.append) for lines in told)
    )
    try:
        assert sorted(codes) == [0, 2]
        won, lost = told[codes.index(0)], told[codes.index(2)]
        assert [line for line in lost if line.startswith("error: ")] == lost
        assert f"a mesh is already running on {paths.root}" in lost[0]
        assert (await openrl(paths, "up", "--detach")).code == 2
        assert paths.detached.read_text().splitlines()[: len(won)] == won
        assert list(paths.root.glob("up.out.*")) == []
    finally:
        assert (await openrl(paths, "down")).code == 0


async def test_a_detached_mesh_that_fails_says_why(paths: Paths) -> None:
    told: list[str] = []
    assert await asyncio.to_thread(run_detached, paths, up_argv(paths, 0, "wrong"), echo=told.append) == 2
    assert "error: stand-in-0: colour 'plaid' is unknown: choose red or blue" in told


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mesh = Mesh(Paths.of(tmp_path / "file" / "data"))
    with pytest.raises(UserError, match="cannot be used .*choose another with --data"):
        async with running(mesh):
            pass
