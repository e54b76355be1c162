"""The command line against a real bus and a coordinator that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.local.client import CONFIG_FILE, WEIGHTS_FILE
from services.local.config import Paths
from shared import topology
from shared.bus import Bus
from shared.contracts.episodes import EnvironmentSpec, RewardSpec
from shared.contracts.jobs import (
    AlgorithmSpec,
    ControlJob,
    Evaluation,
    FieldError,
    JobAnswer,
    JobChanged,
    JobPhase,
    JobProgressed,
    JobRecord,
    JobSpec,
    StepReport,
    SubmitJob,
)
from shared.contracts.policies import LoraSpec, PolicyRecord, PolicyRef
from shared.tasks import cancelled
from shared.topology import Channel
from tests.mesh.local_runs import Mesh, eventually, openrl, run, running

STEPS = 3
SPEC = {
    "name": "sums",
    "base_model": "tiny",
    "environment": {"name": "arithmetic"},
    "reward": {"name": "exact_match"},
    "algorithm": {"steps": STEPS},
}


class FakeCoordinator:
    """Takes commands, remembers them, and refuses what is called `bad`."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.specs: list[Any] = []
        self.commands: list[tuple[str, str]] = []
        self.tasks = [asyncio.create_task(self._submissions())]
        for channel in (topology.CANCEL, topology.PAUSE, topology.RESUME, topology.DELETE):
            self.tasks.append(asyncio.create_task(self._controls(channel)))

    async def stop(self) -> None:
        await cancelled([*self.tasks])

    async def _submissions(self) -> None:
        async for delivery in self.bus.follow(topology.SUBMIT):
            command: SubmitJob = delivery.message
            self.specs.append(command.spec)
            errors = [
                FieldError(path="algorithm.stepz", message="unknown field, did you mean 'steps'?"),
                FieldError(path="base_model", message="no sampler serves 'huge': serving are tiny"),
            ]
            refused = command.spec.get("name") == "bad"
            await self._answer(command.request_id, None if refused else "sums-1", errors if refused else [])

    async def _controls(self, channel: Channel[ControlJob]) -> None:
        async for delivery in self.bus.follow(channel):
            command = delivery.message
            self.commands.append((channel.name, command.job))
            known = command.job == "sums-1"
            errors = [] if known else [FieldError(path="job", message=f"there is no job {command.job!r}")]
            await self._answer(command.request_id, command.job if known else None, errors)

    async def _answer(self, request: str | None, job: str | None, errors: list[FieldError]) -> None:
        assert request is not None
        await self.bus.answer(JobAnswer(request_id=request, job=job, errors=errors))

    async def put(self, phase: JobPhase, reward: str = "exact_match", **fields: Any) -> None:
        """Write the job's record."""
        spec = JobSpec(
            name="sums",
            base_model="tiny",
            environment=EnvironmentSpec(name="arithmetic"),
            reward=RewardSpec(name=reward),
            algorithm=AlgorithmSpec(steps=STEPS),
        )
        record = JobRecord(job="sums-1", spec=spec, phase=phase, created=1.0, **fields)
        await self.bus.table(topology.JOB_RECORDS).put("sums-1", record)

    async def enter(self, phase: JobPhase, reason: str = "") -> None:
        await self.bus.publish(topology.JOB_PHASES, JobChanged(job="sums-1", phase=phase, reason=reason), job="sums-1")

    async def step(self, step: int, accuracy: float | None = None) -> None:
        report = StepReport(step=step, reward=step / 10, tokens_per_second=200.0, trained_groups=4, skipped_groups=2)
        evaluation = None if accuracy is None else Evaluation(step=step, accuracy=accuracy, tasks=64)
        await self.bus.publish(
            topology.JOB_PROGRESS,
            JobProgressed(job="sums-1", step=step, steps=STEPS, report=report if step else None, evaluation=evaluation),
            job="sums-1",
        )

    async def save_policy(self) -> None:
        policy = PolicyRef(run="job:sums-1", version=3)
        record = PolicyRecord(
            policy=policy,
            base_model="tiny",
            lora=LoraSpec(),
            config=await self.bus.blobs.put("policies/3/adapter_config.json", b'{"peft_type": "LORA"}'),
            weights=await self.bus.blobs.put("policies/3/adapter_model.safetensors", b"weights"),
        )
        await self.bus.table(topology.POLICIES).put((policy.run, "3"), record)
        await self.put("succeeded", policy=policy, step=STEPS)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths.of(tmp_path / "data")


@pytest.fixture
async def coordinator(paths: Paths) -> AsyncIterator[FakeCoordinator]:
    async with running(Mesh(paths)) as bus:
        fake = FakeCoordinator(bus)
        yield fake
        await fake.stop()


async def test_submit_sends_json_toml_or_standard_input(
    paths: Paths, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    (tmp_path / "job.json").write_text(json.dumps(SPEC))
    (tmp_path / "job.toml").write_text(
        'name = "sums"\nbase_model = "tiny"\nenvironment.name = "arithmetic"\nreward.name = "exact_match"\n'
        f"algorithm.steps = {STEPS}\n"
    )
    outcomes = [
        await openrl(paths, "submit", str(tmp_path / "job.json")),
        await openrl(paths, "submit", str(tmp_path / "job.toml")),
        await openrl(paths, "submit", "-", "--json", given=json.dumps(SPEC)),
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    assert coordinator.specs == [SPEC] * 3
    assert outcomes[0].out == "job sums-1\n"
    assert outcomes[2].json == {"job": "sums-1", "errors": []}


async def test_a_refused_job_prints_every_error_with_its_path(paths: Paths, coordinator: FakeCoordinator) -> None:
    bad = json.dumps(SPEC | {"name": "bad"})
    outcome = await openrl(paths, "submit", "-", given=bad)
    assert outcome.code == 2
    assert "algorithm.stepz: unknown field, did you mean 'steps'?\n" in outcome.err
    assert "base_model: no sampler serves 'huge': serving are tiny\n" in outcome.err
    outcome = await openrl(paths, "submit", "-", "--json", given=bad)
    assert (outcome.code, outcome.json["errors"][1]["path"]) == (2, "base_model")
    assert len(coordinator.specs) == 2


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("job.json", b"{", "is not valid JSON"),
        ("job.toml", b"a = = 1", "is not valid TOML"),
        ("job.json", b"\xff\xfe\x00", "is not text"),
        ("job.json", None, "cannot be read: No such file"),
        ("job.json", b'{"algorithm": {"steps": 1, "steps": 2}}', "has the key 'steps' twice in one object"),
    ],
)
async def test_a_file_that_is_no_job_is_named(
    paths: Paths, tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    outcome = await openrl(paths, "submit", str(tmp_path / name))
    assert outcome.code == 2
    assert complaint in outcome.err
    assert len(outcome.err.splitlines()) == 1


async def test_numbers_that_json_does_not_have_are_named(paths: Paths, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"algorithm": {"learning_rate": NaN, "eps": [1, -Infinity]}}')
    outcome = await openrl(paths, "submit", str(tmp_path / "job.json"))
    assert outcome.code == 2
    for line in ("algorithm.learning_rate: nan is no finite number", "algorithm.eps[1]: -inf is no finite number"):
        assert line in outcome.err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["up", "--prot", "0"], "No such option: --prot"),
        (["up", "--port", "many"], "Invalid value for '--port'"),
        (["submit"], "Missing argument 'file'"),
        (["sumbit"], "No such command 'sumbit'"),
        (["job", "delete"], "Missing argument 'names'"),
        (["up", "--device", "tpu"], "device 'tpu' is unknown: give auto, cpu, cuda"),
    ],
)
async def test_a_wrong_command_line_is_one_clear_line(paths: Paths, arguments: list[str], complaint: str) -> None:
    outcome = await run(sys.executable, "-m", "services.local", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert complaint in outcome.err
    assert len(outcome.err.splitlines()) == 1


async def test_help_is_help(paths: Paths) -> None:
    whole, one = [await run(sys.executable, "-m", "services.local", *argv, "--help") for argv in ([], ["job"])]
    assert (whole.code, one.code) == (0, 0)
    assert "delete" in one.out


async def test_commands_without_a_mesh_say_how_to_start_one(paths: Paths) -> None:
    for command in (
        ["jobs"],
        ["job", "a"],
        ["job", "delete", "a"],
        ["watch", "a"],
        ["cancel", "a"],
        ["export", "a", "out"],
    ):
        outcome = await openrl(paths, *command)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            f"error: no mesh is running on {paths.root}: start one with `openrl up`, or name another with --data\n"
        )


async def test_jobs_are_controlled_and_unknown_ones_refused(paths: Paths, coordinator: FakeCoordinator) -> None:
    for action in ("pause", "resume", "cancel"):
        assert (await openrl(paths, action, "sums-1")).code == 0
    assert coordinator.commands == [("pause", "sums-1"), ("resume", "sums-1"), ("cancel", "sums-1")]
    outcome = await openrl(paths, "cancel", "nobody")
    assert outcome.code == 2
    assert "job: there is no job 'nobody'" in outcome.err


async def test_jobs_are_deleted_by_id(paths: Paths, coordinator: FakeCoordinator) -> None:
    outcome = await openrl(paths, "job", "delete", "sums-1", "nobody", "sums-1")
    assert outcome.code == 2
    assert outcome.out == "job sums-1 is deleted\n" * 2
    assert "there is no job 'nobody'" in outcome.err
    assert coordinator.commands == [("delete", "sums-1"), ("delete", "nobody"), ("delete", "sums-1")]


async def test_what_is_measured_is_an_accuracy_only_if_answers_are_right_or_wrong(
    paths: Paths, coordinator: FakeCoordinator
) -> None:
    await coordinator.put("succeeded", reward="length_penalty", evaluations=[Evaluation(step=0, accuracy=-2, tasks=4)])
    assert "held-out reward before training: -2.000 (4 tasks)" in (await openrl(paths, "job", "sums-1")).out


async def test_jobs_are_listed_and_shown(paths: Paths, coordinator: FakeCoordinator) -> None:
    assert "no jobs yet" in (await openrl(paths, "jobs")).out
    evaluations = [Evaluation(step=0, accuracy=0.0, tasks=64), Evaluation(step=STEPS, accuracy=0.98, tasks=64)]
    await coordinator.put("succeeded", evaluations=evaluations, step=STEPS)
    listed = await openrl(paths, "jobs")
    assert "sums-1" in listed.out
    assert "0.000 -> 0.980" in listed.out
    summary = (await openrl(paths, "jobs", "--json")).json
    assert [(job["job"], job["phase"], job["accuracy_last"]) for job in summary] == [("sums-1", "succeeded", 0.98)]
    assert (await openrl(paths, "job", "sums-1", "--json")).json["spec"]["algorithm"]["steps"] == STEPS
    assert "held-out accuracy after step 3: 0.980 (64 tasks)" in (await openrl(paths, "job", "sums-1")).out
    outcome = await openrl(paths, "job", "nobody")
    assert (outcome.code, outcome.err) == (2, "error: there is no job 'nobody'; the newest: sums-1\n")


async def test_a_late_watcher_sees_the_whole_job_in_order_and_its_end(
    paths: Paths, coordinator: FakeCoordinator
) -> None:
    await coordinator.put("running")
    await coordinator.enter("queued")
    await coordinator.enter("running")
    await coordinator.step(0, 0.0)
    await coordinator.step(1)
    watching = asyncio.create_task(openrl(paths, "watch", "sums-1"))
    await coordinator.step(2)
    await coordinator.step(2)  # told again by a coordinator that came back
    await coordinator.step(3, 0.98)
    await coordinator.put("succeeded", step=STEPS)
    await coordinator.enter("succeeded")
    outcome = await watching
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if line.startswith(("step", "held-out"))]
    assert [line.split("  ")[0].split(":")[0] for line in lines] == [
        "held-out accuracy before training",
        "step 1/3",
        "step 2/3",
        "step 3/3",
        "held-out accuracy after step 3",
    ]
    assert "reward 0.300" in lines[3]
    assert "200 tok/s" in lines[3]
    assert "4 trained, 2 skipped, 0 dropped" in lines[3]
    assert outcome.out.splitlines()[-1] == "job sums-1 succeeded"


async def test_watching_a_job_that_fails_gives_the_reason_and_exit_code_1(
    paths: Paths, coordinator: FakeCoordinator
) -> None:
    await coordinator.put("failed", reason="the reward 'judge' does not answer")
    await coordinator.enter("failed", "the reward 'judge' does not answer")
    outcome = await openrl(paths, "watch", "sums-1")
    assert outcome.code == 1
    assert (outcome.out + outcome.err).count("job sums-1 failed: the reward 'judge' does not answer") == 1


async def test_watch_gives_events_as_json(paths: Paths, coordinator: FakeCoordinator) -> None:
    await coordinator.step(1, 0.5)
    await coordinator.enter("cancelled")
    await coordinator.put("cancelled")
    outcome = await openrl(paths, "watch", "sums-1", "--json")
    events = [json.loads(line) for line in outcome.out.splitlines()]
    assert outcome.code == 1
    assert [event.get("phase") or event["evaluation"]["accuracy"] for event in events] == [0.5, "cancelled"]


async def test_submit_can_go_on_watching(paths: Paths, coordinator: FakeCoordinator) -> None:
    await coordinator.put("running")
    submitting = asyncio.create_task(openrl(paths, "submit", "-", "--watch", given=json.dumps(SPEC)))
    await eventually(lambda: coordinator.specs, "the job has come")
    await coordinator.put("succeeded")
    await coordinator.enter("succeeded")
    outcome = await submitting
    assert (outcome.code, outcome.out.splitlines()[0]) == (0, "job sums-1"), outcome.err


async def test_a_watcher_notices_that_the_mesh_was_stopped(paths: Paths) -> None:
    async with contextlib.AsyncExitStack() as stack:
        bus = await stack.enter_async_context(running(Mesh(paths)))
        fake = FakeCoordinator(bus)
        await fake.put("running")
        await fake.enter("running")
        await fake.stop()
        watching = asyncio.create_task(openrl(paths, "watch", "sums-1"))
        await asyncio.sleep(3)  # nothing shows from outside that it is watching
    outcome = await watching
    assert outcome.code in (1, 2)
    assert "openrl up" in outcome.err


async def test_export_copies_the_newest_policy_for_peft(
    paths: Paths, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    await coordinator.put("running", step=1)
    outcome = await openrl(paths, "export", "sums-1", str(tmp_path / "out"))
    assert (outcome.code, "still the base model" in outcome.err) == (2, True)
    await coordinator.save_policy()
    outcome = await openrl(paths, "export", "sums-1", str(tmp_path / "new" / "out"))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "new" / "out" / CONFIG_FILE).read_bytes() == b'{"peft_type": "LORA"}'
    assert (tmp_path / "new" / "out" / WEIGHTS_FILE).read_bytes() == b"weights"
    outcome = await openrl(paths, "export", "sums-1", str(tmp_path / "new" / "out"))
    assert (outcome.code, "is not empty" in outcome.err) == (2, True)


async def test_export_refuses_weights_that_changed_in_the_store(
    paths: Paths, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    await coordinator.save_policy()
    (paths.blobs / "policies" / "3" / WEIGHTS_FILE).write_bytes(b"WEIGHTS")
    outcome = await openrl(paths, "export", "sums-1", str(tmp_path / "out"))
    assert outcome.code == 1
    assert "checksum differs" in outcome.err
    assert not (tmp_path / "out").exists()


async def test_the_logs_of_all_services_are_one_stream(paths: Paths) -> None:
    async with running(Mesh(paths, "fine", "fine")):
        merged = await openrl(paths, "logs", "--json")
        one = await openrl(paths, "logs", "stand-in-1", "-n", "1")
        unknown = await openrl(paths, "logs", "gatway")
    lines = [json.loads(line) for line in merged.out.splitlines()]
    assert {"stand-in-0", "stand-in-1", "nats-server"} <= {line["replica"] for line in lines}
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert one.out.rstrip().endswith("stand-in-1   stand-in-1 is ready")
    assert unknown.code == 2
    assert "there is no log of 'gatway'" in unknown.err


async def test_doctor_says_what_is_there_and_how_to_mend_the_rest(paths: Paths) -> None:
    outcome = await openrl(paths, "doctor", "--json", "--port", "0")
    checks = {check["name"]: check for check in outcome.json["checks"]}
    assert checks["nats-server"]["ok"]
    assert checks["torch"]["found"]
    assert not checks["models"]["ok"]
    assert "openrl model add" in checks["models"]["mend"]
    assert (outcome.code == 0) == outcome.json["ok"]
    assert "missing" not in (await openrl(paths, "doctor")).out or outcome.code


async def test_models_are_added_listed_and_removed(paths: Paths, tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    directory.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (directory / name).write_text("\x02" + "\0" * 7 + "{}" if name.endswith("tensors") else "{}")
    assert (await openrl(paths, "model", "add", "org/tiny", str(directory))).code == 0
    assert (await openrl(paths, "model", "list", "--json")).json == {"org/tiny": str(directory)}
    assert (await openrl(paths, "model", "remove", "org/tiny")).code == 0
    assert directory.exists()
    outcome = await openrl(paths, "model", "remove", "org/tiny")
    assert (outcome.code, outcome.err) == (2, "error: model 'org/tiny' is not registered; registered: none\n")


async def test_up_without_a_model_says_how_to_add_one(paths: Paths) -> None:
    outcome = await openrl(paths, "up")
    assert outcome.code == 2
    assert "add one with `openrl model add smollm2-135m-instruct`" in outcome.err


async def test_the_data_directory_can_come_from_the_environment_or_the_working_directory(tmp_path: Path) -> None:
    record = msgspec.json.encode({"tiny": "/nowhere"})
    (tmp_path / ".openrl").mkdir()
    (tmp_path / ".openrl" / "models.json").write_bytes(record)
    outcome = await run(sys.executable, "-m", "services.local", "model", "list", "--json", cwd=tmp_path)
    assert outcome.json == {"tiny": "/nowhere"}
