"""A whole job in one loop: submitted as a message, sampled, scored, trained, evaluated, told of and saved."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import nats
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from services.coordinator.records import Records
from services.environment.config import EnvironmentConfig
from services.environment.service import EnvironmentService
from services.reward.config import RewardConfig
from services.reward.service import RewardService
from shared import topology
from shared.bus import Bus
from shared.contracts.jobs import FINISHED, ControlJob, JobAnswer, JobRecord, StepReport, SubmitJob
from shared.process import running
from tests.mesh.harness import MODEL, Place, eventually


def job(**changes: Any) -> dict[str, Any]:
    """A job that ends in seconds: the reward is for short answers, which even a random model can learn."""
    base = {
        "name": "tiny-job",
        "base_model": MODEL,
        "environment": {"name": "arithmetic", "params": {"held_out": 4}},
        "reward": {"name": "length_penalty", "params": {"budget": 2, "per_token": 0.2, "floor": -1.0}},
        "algorithm": {"steps": 3, "group_size": 4, "groups_per_step": 2, "learning_rate": 0.02},
        "lora": {"rank": 4},
        "sampling": {"max_tokens": 6},
        "evaluation": {"tasks": 4, "every": 2},
        "seed": 7,
    }
    return {**base, **changes}


@contextlib.asynccontextmanager
async def mesh(place: Place, **coordinator: Any) -> AsyncIterator[None]:
    """All services, in this loop."""
    models = {MODEL: str(place.model_dir)}
    environment = EnvironmentConfig(**place.common, replica="environment-1", models=models)
    reward = RewardConfig(**place.common, replica="reward-1")
    async with (
        running("environment", environment, EnvironmentService),
        running("reward", reward, RewardService),
        place.sampler(),
        place.trainer(),
        place.coordinator(**coordinator),
    ):
        yield


async def submit(bus: Bus, spec: dict[str, Any]) -> JobAnswer:
    answer = await bus.ask(topology.SUBMIT, SubmitJob(spec=spec, request_id=bus.new_request()), timeout=20)
    assert isinstance(answer, JobAnswer)
    return answer


async def ended(bus: Bus, job_id: str, seconds: float = 90) -> JobRecord:
    jobs = bus.table(topology.JOB_RECORDS)

    async def look() -> JobRecord | None:
        entry = await jobs.get(job_id)
        return entry.value if entry and entry.value.phase in FINISHED else None

    return await eventually(look, seconds)


async def finished(bus: Bus, spec: dict[str, Any]) -> JobRecord:
    answer = await submit(bus, spec)
    assert answer.job is not None, answer.errors
    return await ended(bus, answer.job)


async def rows(bus: Bus, job_id: str) -> list[dict[str, Any]]:
    """The step table of a finished job, without what depends on the clock."""
    found = []
    async for delivery in bus.follow(topology.JOB_PROGRESS, job=job_id):
        if delivery.message.report is not None:
            row = msgspec.to_builtins(delivery.message.report)
            found.append({key: value for key, value in row.items() if "second" not in key})
            if row["step"] == delivery.message.steps:
                break
    return found


async def test_a_job_trains_evaluates_and_leaves_an_adapter_that_peft_loads(place: Place, bus: Bus) -> None:
    async with mesh(place):
        record = await finished(bus, job())
        assert (record.phase, record.step) == ("succeeded", 3), record.reason
        assert [evaluation.step for evaluation in record.evaluations] == [0, 2, 3]
        table = await rows(bus, record.job)
    assert [row["step"] for row in table] == [1, 2, 3]
    assert all(row["tokens"] > 0 for row in table)
    base = AutoModelForCausalLM.from_pretrained(place.model_dir, dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7]])
    plain = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, record.adapter)(tokens).logits
    assert not torch.allclose(plain, adapted), "the adapter has learnt something"
    lines = (place.directory / "jobs" / f"{record.job}.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert sorted(kinds) == ["evaluation"] * 3 + ["step"] * 3


async def test_rewards_rise(place: Place, bus: Bus) -> None:
    async with mesh(place):
        spec = job(algorithm={"steps": 12, "group_size": 8, "groups_per_step": 4, "learning_rate": 0.02},
                   evaluation={"tasks": 0})  # fmt: skip
        record = await finished(bus, spec)
        table = await rows(bus, record.job)
    first, last = table[0]["reward"], table[-1]["reward"]
    assert last > first + 0.1, [row["reward"] for row in table]


async def test_the_same_seed_gives_the_same_step_table_without_staleness(place: Place, bus: Bus) -> None:
    spec = job(algorithm={"steps": 3, "group_size": 4, "groups_per_step": 3, "max_staleness": 0, "learning_rate": 0.02})
    async with mesh(place):
        first, second = await finished(bus, spec), await finished(bus, spec)
        tables = [await rows(bus, record.job) for record in (first, second)]
        other = await finished(bus, {**spec, "seed": 8})
        assert await rows(bus, other.job) != tables[0]
    assert tables[0] == tables[1]
    assert [e.accuracy for e in first.evaluations] == [e.accuracy for e in second.evaluations]


@pytest.mark.parametrize(("staleness", "when"), [(0, {1, 2, 3}), (1, {1})])
async def test_sampler_and_trainer_agree_wherever_versions_are_equal(
    place: Place, bus: Bus, staleness: int, when: set[int]
) -> None:
    """With staleness 1 only the first step is sure to train what its own weights have sampled."""
    algorithm = {"steps": 3, "group_size": 8, "groups_per_step": 2, "max_staleness": staleness, "learning_rate": 0.002}
    # Long enough for some to end early: rewards differ, and there is something to train on in each step.
    long = {"sampling": {"max_tokens": 100}, "evaluation": {"tasks": 0}}
    reward = {"name": "length_penalty", "params": {"budget": 0, "per_token": 0.01, "floor": -9.0}}
    async with mesh(place):
        spec = job(algorithm=algorithm, reward=reward, lora={"rank": 4, "train_unembed": True}, **long)
        record = await finished(bus, spec)
        table = await rows(bus, record.job)
    found = {row["step"]: row["metrics"].get("logprob_mismatch:mean") for row in table}
    assert [row["step"] for row in table if not row["trained_groups"]] == []
    assert all(found[step] is not None for step in when)
    assert all(0 <= value <= 1e-4 for value in found.values() if value is not None), found


async def test_a_job_is_submitted_and_followed_over_a_bare_connection(place: Place, nats_server: Any) -> None:
    """What a program in any language does: JSON on subjects, nothing of this project."""
    async with mesh(place):
        client = await nats.connect(nats_server.url)
        answers = await client.subscribe("rl.v1.results.my-request")
        events = await client.subscribe("rl.v1.events.>")
        body = json.dumps({"spec": job(), "request_id": "my-request"}).encode()
        await client.jetstream().publish("rl.v1.jobs.submit", body)
        answer = json.loads((await answers.next_msg(timeout=20)).data)
        assert answer["errors"] == []
        steps, phase = [], ""
        while phase not in ("succeeded", "failed"):
            message = await events.next_msg(timeout=60)
            event = json.loads(message.data)
            if message.subject == f"rl.v1.events.progress.{answer['job']}" and event["report"]:
                steps.append(event["report"]["step"])
            if message.subject == f"rl.v1.events.job.{answer['job']}":
                phase = event["phase"]
        await client.close()
    assert (steps, phase) == ([1, 2, 3], "succeeded")


async def test_a_bad_job_is_answered_with_every_error_and_the_mesh_goes_on(place: Place, bus: Bus) -> None:
    async with mesh(place):
        bad = {**job(), "reward": {"name": "vibes"}, "environment": {"name": "chess"}, "base_model": "gpt"}
        answer = await submit(bus, bad)
        assert answer.job is None
        assert {error.path for error in answer.errors} == {"reward.name", "environment.name", "base_model"}
        assert (await finished(bus, job())).phase == "succeeded"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"environment": {"name": "arithmetic", "params": {"nonsense": 1}}}, "nonsense"),
        ({"reward": {"name": "regex", "params": {"pattern": "("}}}, "pattern"),
        ({"environment": {"name": "reasoning_gym", "params": {"dataset": "no_such_set"}}}, "no_such_set"),
        ({"sampling": {"max_tokens": 1_000_000}}, "context"),
    ],
)
async def test_a_job_that_cannot_work_fails_with_its_reason(
    place: Place, bus: Bus, change: dict[str, Any], reason: str
) -> None:
    async with mesh(place):
        record = await finished(bus, job(**change))
    assert record.phase == "failed"
    assert reason in record.reason


async def test_a_job_is_cancelled_paused_and_resumed(place: Place, bus: Bus) -> None:
    long = job(algorithm={"steps": 500, "group_size": 4, "groups_per_step": 2})
    jobs = bus.table(topology.JOB_RECORDS)

    async def command(channel: topology.Channel[ControlJob], job_id: str) -> None:
        await bus.ask(channel, ControlJob(job=job_id, request_id=bus.new_request()), timeout=20)

    async def reached(job_id: str, phase: str, step: int = 0) -> None:
        async def look() -> bool | None:
            entry = await jobs.get(job_id)
            return True if entry and entry.value.phase == phase and entry.value.step >= step else None

        await eventually(look, 60)

    async with mesh(place):
        answer = await submit(bus, long)
        assert answer.job is not None
        await reached(answer.job, "running", step=1)
        await command(topology.PAUSE, answer.job)
        await reached(answer.job, "paused")
        entry = await jobs.get(answer.job)
        assert entry is not None
        stopped_at = entry.value.step
        await command(topology.RESUME, answer.job)
        await reached(answer.job, "running", step=stopped_at + 2)
        await command(topology.CANCEL, answer.job)
        await reached(answer.job, "cancelled")
        with pytest.raises(Exception, match="already cancelled"):
            await command(topology.CANCEL, answer.job)
        with pytest.raises(Exception, match="there is no job 'nobody'"):
            await command(topology.CANCEL, "nobody")


async def test_a_coordinator_that_comes_back_goes_on_where_it_was(place: Place, bus: Bus) -> None:
    """The first one is stopped after it wrote down step 2, and before it told anybody."""
    tell = Records._tell_step

    async def tell_of_one(records: Records, row: StepReport) -> None:
        await (tell(records, row) if row.step < 2 else asyncio.Event().wait())

    spec = job(algorithm={"steps": 8, "group_size": 4, "groups_per_step": 2, "learning_rate": 0.02})
    models = {MODEL: str(place.model_dir)}
    async with (
        running("environment", EnvironmentConfig(**place.common, models=models), EnvironmentService),
        running("reward", RewardConfig(**place.common), RewardService),
        place.sampler(),
        place.trainer(),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Records, "_tell_step", tell_of_one)
            async with place.coordinator():
                answer = await submit(bus, spec)
                assert answer.job is not None
                jobs = bus.table(topology.JOB_RECORDS)

                async def some_steps() -> bool | None:
                    entry = await jobs.get(answer.job or "")
                    return True if entry and entry.value.step >= 2 else None

                await eventually(some_steps, 60)
        async with place.coordinator(replica="coordinator-2"):
            record = await ended(bus, answer.job)
            table = await rows(bus, record.job)
    assert record.phase == "succeeded"
    assert [row["step"] for row in table] == list(range(1, 9)), "every step was told of, and once"
    lines = map(json.loads, (place.directory / "jobs" / f"{record.job}.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 9))


async def test_groups_with_equal_rewards_are_skipped_and_counted(place: Place, bus: Bus) -> None:
    spec = job(reward={"name": "length_penalty", "params": {"budget": 100, "per_token": 0.2, "floor": -1.0}})
    async with mesh(place):
        record = await finished(bus, spec)
    assert record.phase == "succeeded"
    assert record.skipped_groups == 6
    assert record.updates == 0
    assert Path(record.adapter).is_dir(), "an adapter is left even if nothing was learnt"


async def test_two_jobs_at_once_both_end(place: Place, bus: Bus) -> None:
    async with mesh(place):
        records = await asyncio.gather(finished(bus, job()), finished(bus, job(name="other", seed=9)))
    assert [record.phase for record in records] == ["succeeded", "succeeded"]
