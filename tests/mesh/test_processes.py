"""The mesh as a user has it: processes, started and asked through the `openrl` command; some of them killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared import topology
from shared.blobs import BlobStore
from shared.bus import Bus
from tests.mesh.harness import eventually

# Whole jobs in real processes, killed and started anew: on a busy machine this takes minutes.
pytestmark = pytest.mark.timeout(400)

JOB = {
    "name": "killed",
    "base_model": "tiny",
    "environment": {"name": "arithmetic", "params": {"held_out": 4}},
    "reward": {"name": "length_penalty", "params": {"budget": 2, "per_token": 0.2, "floor": -1.0}},
    "algorithm": {"steps": 60, "group_size": 4, "groups_per_step": 2, "learning_rate": 0.02},
    "lora": {"rank": 4},
    "sampling": {"max_tokens": 6},
    "evaluation": {"tasks": 4, "every": 10},
}


class Openrl:
    """The command, on one data directory."""

    def __init__(self, data: Path) -> None:
        self.data = data

    async def __call__(self, *arguments: str, expect: tuple[int, ...] = (0,)) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.local",
            *arguments,
            env={**os.environ, "OPENRL_DATA": str(self.data), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode()
        assert process.returncode in expect, output
        return output

    async def status(self) -> dict[str, Any]:
        """Exit code 1 says that a service is being started again."""
        found: dict[str, Any] = json.loads(await self("status", "--json", expect=(0, 1)))
        return found

    async def kill(self, service: str) -> None:
        """End one process of the mesh without warning."""
        state = json.loads((self.data / "state.json").read_text())
        (pid,) = [item["pid"] for item in state["services"] if item["name"].startswith(service)]
        os.kill(pid, signal.SIGKILL)

    async def reached(self, job: str, step: int) -> None:
        """Wait until a job has done so many steps."""
        url = json.loads((self.data / "state.json").read_text())["nats_url"]
        bus = await Bus.connect(url, BlobStore(str(self.data / "blobs")), name="test")
        jobs = bus.table(topology.JOB_RECORDS)

        async def look() -> bool | None:
            entry = await jobs.get(job)
            assert entry is not None
            assert entry.value.phase in ("queued", "running", "succeeded"), entry.value.reason
            return True if entry.value.step >= step else None

        await eventually(look, 90)
        await bus.close()

    def steps(self, job: str) -> list[dict[str, Any]]:
        """The step table of a job, from its file of metrics."""
        rows = map(json.loads, (self.data / "metrics" / f"{job}.jsonl").read_text().splitlines())
        return [row for row in rows if row["kind"] == "step"]


@pytest.fixture
async def openrl(tmp_path: Path, tiny_model: Path) -> AsyncIterator[Openrl]:
    command = Openrl(tmp_path / "data")
    await command("model", "add", "tiny", str(tiny_model))
    await command("up", "--port", "0", "--detach")
    yield command
    await command("down")


async def submit(openrl: Openrl, path: Path, **changes: Any) -> str:
    path.write_text(json.dumps({**JOB, **changes}))
    answer: dict[str, str] = json.loads(await openrl("submit", str(path), "--json"))
    return answer["job"]


@pytest.mark.timeout(400)
async def test_a_job_survives_the_death_of_every_process_and_a_restart(openrl: Openrl, tmp_path: Path) -> None:
    job = await submit(openrl, tmp_path / "job.json")
    for number, service in enumerate(("trainer", "sampler", "coordinator", "environment", "reward", "nats-server")):
        await openrl.reached(job, step=2 * number + 1)
        await openrl.kill(service)
    await openrl.reached(job, step=14)
    await openrl("down")
    await openrl("up", "--port", "0", "--detach")
    output = await openrl("watch", job)
    assert "succeeded" in output
    assert sorted({row["step"] for row in openrl.steps(job)}) == list(range(1, 61))
    await openrl("export", job, str(tmp_path / "adapter"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


async def test_kills_change_nothing_about_the_weights(openrl: Openrl, tmp_path: Path) -> None:
    """Without staleness a job is reproducible; so must be one whose trainer and sampler were killed."""
    changes = {"algorithm": {**JOB["algorithm"], "max_staleness": 0}, "evaluation": {"tasks": 0}}  # type: ignore[dict-item]
    undisturbed = await submit(openrl, tmp_path / "job.json", **changes)
    await openrl("watch", undisturbed)
    killed = await submit(openrl, tmp_path / "job.json", **changes)
    for number, service in enumerate(("trainer", "coordinator", "sampler")):
        await openrl.reached(killed, step=10 * number + 3)
        await openrl.kill(service)
    await openrl("watch", killed)
    tables = [[essence(row) for row in openrl.steps(job)] for job in (undisturbed, killed)]
    assert tables[0] == tables[1]
    for job in (undisturbed, killed):
        await openrl("export", job, str(tmp_path / job))
    weights = [load_file(tmp_path / job / "adapter_model.safetensors") for job in (undisturbed, killed)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-5, atol=1e-6)


def essence(row: dict[str, Any]) -> tuple[Any, ...]:
    """What two equal jobs share of a step; the trainer's own count of steps would show one that was done twice."""
    count = row["metrics"].get("step:max")
    return row["step"], row["reward"], row["tokens"], count, pytest.approx(row["loss"], abs=1e-6)
