"""What is shown and decided without a mesh: a job's progress, delays, ports, tables, checks."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
import sys
from pathlib import Path

import pytest
from rich.console import Console

from services.local import doctor, show, status
from services.local.config import Paths
from services.local.demo import Demo, demo_spec, outcome
from services.local.endings import finish
from services.local.machine import check_port, readable, store_limit, streams_size
from services.local.printing import duration, job_summary, jobs_table, table
from services.local.processes import LONGEST_DELAY, describe_exit, restart_delay
from services.local.progress import JobView, activity_line
from shared.contracts.episodes import EnvironmentSpec, RewardSpec
from shared.contracts.jobs import Evaluation, JobChanged, JobProgressed, JobRecord, JobSpec, StepReport
from shared.contracts.replicas import ReplicaRecord
from shared.errors import UserError
from shared.tasks import cancelled


def stepped(step: int, accuracy: float | None = None) -> JobProgressed:
    evaluation = None if accuracy is None else Evaluation(step=step, accuracy=accuracy, tasks=8)
    report = StepReport(step=step, reward=0.25, loss=-0.01) if step else None
    return JobProgressed(job="j", step=step, steps=12, report=report, evaluation=evaluation)


def replica(name: str, activity: str) -> ReplicaRecord:
    return ReplicaRecord(
        replica=name, service=name, pid=1, host="127.0.0.1", metrics_port=1, activity=activity, ready=True
    )


def test_a_step_is_told_once_and_an_evaluation_when_it_is_news() -> None:
    view = JobView("j")
    assert view.progressed(stepped(0, 0.0)) == ["held-out accuracy before training: 0.000 (8 tasks)"]
    first = view.progressed(stepped(1))
    assert first[0].startswith("step  1/12  reward 0.250  loss -0.0100")
    assert view.progressed(stepped(1)) == []
    assert len(view.progressed(stepped(2, 0.5))) == 2
    assert view.progressed(stepped(2, 0.5)) == []
    assert view.first_and_last is not None
    assert [evaluation.accuracy for evaluation in view.first_and_last] == [0.0, 0.5]
    assert (view.step, view.steps) == (2, 12)


def test_a_phase_is_told_when_it_changes_and_an_end_is_final() -> None:
    view = JobView("j")
    assert view.changed(JobChanged(job="j", phase="queued")) == []
    assert view.changed(JobChanged(job="j", phase="running")) == ["job j is running"]
    assert view.changed(JobChanged(job="j", phase="failed", reason="no reward")) == ["job j failed: no reward"]
    assert view.changed(JobChanged(job="j", phase="running")) == []
    assert view.finished


def test_an_evaluation_without_a_score_is_shown_as_not_measured() -> None:
    unmeasured = Evaluation(step=0, accuracy=None, tasks=8, failed=8)
    view = JobView("j")
    event = JobProgressed(job="j", step=0, steps=12, evaluation=unmeasured)
    assert view.progressed(event) == ["held-out accuracy before training: not measured (8 tasks, 8 failed)"]
    environment, reward = EnvironmentSpec(name="arithmetic"), RewardSpec(name="exact_match")
    spec = JobSpec(name="j", base_model="m", environment=environment, reward=reward)
    measured = Evaluation(step=40, accuracy=0.0, tasks=8)
    record = JobRecord(job="j", spec=spec, evaluations=[unmeasured, measured])
    assert "not measured -> 0.000" in jobs_table([record])
    assert job_summary(record)["accuracy_first"] is None
    assert view.recorded(record) == ["held-out accuracy after step 40: 0.000 (8 tasks)"]
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(show.picture(view))
    assert "0: not measured  40: 0.000" in console.export_text()


def test_the_live_table_shows_steps_accuracy_and_what_services_do() -> None:
    view = JobView("j")
    for step in range(1, 21):
        view.progressed(stepped(step, step / 20 if step % 10 == 0 else None))
    view.replicas = [replica("sampler", "generating 8 sequences"), replica("trainer", "idle")]
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with show.LiveTable(console) as live:
        live.news(view, None, [])
        live.refresh(view)
    console.print(show.picture(view))
    text = str(console.file.getvalue())  # type: ignore[attr-defined]
    assert "10: 0.500  20: 1.000" in text
    assert "generating 8 sequences" in text
    assert "step 20/12" in text.replace("\n", " ")


def test_plain_output_says_after_a_while_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    lines = show.Lines(told.append)
    view = JobView("j", replicas=[replica("sampler", "generating 8 sequences"), replica("trainer", "idle, 1 runs")])
    lines.refresh(view)
    assert told == []
    monkeypatch.setattr(show, "QUIET_SECONDS", 0.0)
    lines.refresh(view)
    assert told == ["  sampler: generating 8 sequences"]
    assert activity_line([]) == "all services are idle"


def test_restarts_wait_longer_and_longer_up_to_a_limit() -> None:
    delays = [restart_delay(failures) for failures in range(1, 40)]
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY


def test_exits_are_put_into_words() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL (out of memory?)"
    assert describe_exit(-signal.SIGSEGV) == "killed by SIGSEGV"
    assert describe_exit(-250) == "killed by signal 250"


def test_a_port_that_is_taken_or_impossible_is_named() -> None:
    check_port(0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"):
            check_port(port)
    for impossible in (-1, 70000):
        with pytest.raises(UserError, match=f"port {impossible} does not exist"):
            check_port(impossible)


def test_the_bus_always_gets_the_room_that_its_streams_reserve(tmp_path: Path) -> None:
    assert store_limit(tmp_path) >= streams_size()


def test_sizes_times_and_tables_are_readable() -> None:
    assert [readable(size) for size in (0, 1536, 3 << 20, 5 << 40)] == ["0 B", "1.5 KiB", "3.0 MiB", "5.0 TiB"]
    assert [duration(seconds) for seconds in (3, 150, 9000, 200_000)] == ["3 s", "2 min", "2 h", "2 d"]
    assert table(("A", "BB"), [("long", 1)]) == "A     BB\nlong  1"


def test_status_shows_open_jobs_and_the_newest_that_are_finished() -> None:
    def job(number: int, phase: str) -> dict[str, object]:
        return {"job": f"j-{number}", "phase": phase, "step": 1, "steps": 2, "reason": "because " * 30}

    jobs = [job(0, "running"), *(job(number, "failed") for number in range(1, 9))]
    disk = {"free": 1, "bus": 1, "blobs": 1}
    answer = {"running": True, "data": "x", "phase": "ready", "uptime_s": 1, "pid": 1, "nats_url": "u", "disk": disk}
    answer |= {"gateway_url": "http://h:1", "services": [], "jobs": jobs, "problem": ""}
    short, whole = status.text(answer), status.text(answer, all_jobs=True)
    assert [f"j-{number} " in short for number in range(9)] == [True, False, False, False, *[True] * 5]
    assert "3 older finished jobs: `openrl status --all`" in short
    assert "http://h:1" in short
    assert max(len(line) for line in short.splitlines()) < 100
    assert all(f"j-{number} " in whole for number in range(9))
    assert ("because " * 30).strip() in whole


def test_doctor_finds_what_is_missing(tmp_path: Path) -> None:
    missing = doctor.package("no-such-package-here", "pip install it")
    assert (missing.ok, missing.essential, missing.mend) == (False, True, "pip install it")
    (tmp_path / "models.json").write_text('{"tiny": "/nowhere"}')
    broken = doctor.models(Paths.of(tmp_path))
    assert (broken.ok, broken.essential) == (False, True)
    assert "/nowhere does not exist" in broken.found
    assert doctor.directory(Paths.of(tmp_path / "new" / "one")).ok
    assert doctor.python().found == sys.version.split()[0]


def test_the_demo_takes_model_and_seed_from_the_command_line(tmp_path: Path) -> None:
    spec = tmp_path / "demo.json"
    spec.write_text('{"name": "demo", "base_model": "x", "seed": 1}')
    demo = Demo(paths=Paths.of(tmp_path), model="tiny", spec=spec, seed=None, out=None)
    assert demo_spec(demo) == {"name": "demo", "base_model": "tiny", "seed": 1}
    spec.write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        demo_spec(demo)


def test_the_demo_ends_with_accuracies_and_how_to_load_the_adapter() -> None:
    view = JobView("j")
    view.progressed(stepped(0, 0.0))
    view.progressed(stepped(12, 0.75))
    lines = outcome(view, Path("adapters/j"), "tiny", Path("/models/tiny"))
    text = "\n".join(lines)
    assert "before training: 0.000" in text
    assert "after step 12: 0.750" in text
    assert "PeftModel.from_pretrained(base, 'adapters/j')" in text


async def test_a_task_that_loses_a_cancellation_is_ended_all_the_same() -> None:
    lost = 0

    async def deaf() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost > 1:
                    raise

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await asyncio.wait_for(cancelled([task]), 5)
    assert lost == 2


async def test_what_must_be_finished_is_finished_however_often_it_is_cancelled() -> None:
    finished = False

    async def work() -> None:
        nonlocal finished
        await asyncio.sleep(0.05)
        finished = True

    task = asyncio.create_task(finish(work()))
    for _ in range(3):
        await asyncio.sleep(0.005)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished
