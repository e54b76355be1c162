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

from services.coordinator import handlers
from services.coordinator.records import Records
from services.environment.config import EnvironmentConfig
from services.environment.service import EnvironmentService
from services.reward.config import RewardConfig
from services.reward.service import RewardService
from shared import topology
from shared.bus import Bus
from shared.contracts.jobs import FINISHED, ControlJob, JobAnswer, JobRecord, StepReport, SubmitJob
from shared.contracts.replicas import ReplicaRecord
from shared.errors import UserError
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


async def test_a_job_that_could_not_work_is_refused_with_everything_that_its_services_know(
    place: Place, bus: Bus
) -> None:
    """Types and names by the coordinator, parameters by the environment and the reward: one answer."""
    gym = {"name": "reasoning_gym", "params": {"dataset": "no_such_set"}}
    wrong: list[tuple[dict[str, Any], set[str]]] = [
        (
            {
                "environment": {"name": "arithmetic", "params": {"zzz": 1, "min": "a"}},
                "reward": {"name": "regex", "params": {}},
                "evaluation": {"reward": {"name": "weighted", "params": {"parts": []}}},
                "algorithm": {"steps": 0},
                "base_model": "gpt",
            },
            {
                "environment.params.zzz", "environment.params.min", "reward.params.pattern",
                "evaluation.reward.params.parts", "algorithm.steps", "base_model",
            },
        ),
        ({"environment": {"name": "arithmetic", "params": {"min": 9, "max": 1}}}, {"environment.params"}),
        ({"environment": gym, "reward": {"name": "regex", "params": {"pattern": "("}}},
         {"environment.params", "reward.params"}),
        ({"evaluation": {"tasks": 5}}, {"evaluation.tasks"}),
        ({"sampling": {"max_tokens": 1_000_000}}, {"sampling.max_tokens"}),
    ]  # fmt: skip
    async with mesh(place):
        for change, paths in wrong:
            answer = await submit(bus, job(**change))
            assert answer.job is None
            assert {error.path for error in answer.errors} == paths
    assert await bus.table(topology.JOB_RECORDS).items() == []


async def test_a_service_that_does_not_say_whether_it_can_is_named(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "CHECK_SECONDS", 0.2)
    offers = ["environment:arithmetic", "reward:length_penalty"]
    replica = ReplicaRecord(replica="a", service="a", pid=1, host="h", metrics_port=1, base_model=MODEL, offers=offers)
    for service in ("environment", "sampler", "trainer"):
        record = msgspec.structs.replace(replica, replica=service, service=service)
        await bus.table(topology.REPLICAS).put(service, record)
    async with place.coordinator():
        answer = await submit(bus, job())
    assert {error.path for error in answer.errors} == {"environment", "reward"}
    assert "the environment service did not say in 0.2 s whether 'arithmetic' works" in answer.errors[0].message


async def asked(client: Any, subject: str, body: bytes, answers: str, count: int = 1) -> list[dict[str, Any]]:
    """What a bare client hears, who sends something `count` times."""
    subscription = await client.subscribe(answers)
    found = []
    for _ in range(count):
        await client.jetstream().publish(subject, body)
        found.append(json.loads((await subscription.next_msg(timeout=20)).data))
    await subscription.unsubscribe()
    return found


async def test_a_bare_client_is_always_answered(place: Place, nats_server: Any) -> None:
    client = await nats.connect(nats_server.url)
    cases = [
        ("cancel", b'{"job":"nosuch","request_id":"c1"}', "c1", "there is no job 'nosuch'"),
        ("cancel", b'{"job":3,"request_id":"c2"}', "c2", "Expected `str`, got `int`"),
        ("cancel", b'{"job":"a","request_id":"c3",}', "c3", "malformed"),
        ("submit", b'{"spec":{"seed":NaN},"request_id":"c4"}', "c4", "malformed"),
        ("submit", msgspec.msgpack.encode({"request_id": "c5"}), "c5", "missing required field `spec`"),
        ("submit", b'{"request_id":7}', "7", "Expected `str"),
        ("submit", b'{"spec":{},"request_id":"a.b.c"}', "a.b.c", "is required"),
        ("submit", b'{"spec":{},"request_id":"bad id *"}', ">", "request_id 'bad id *' cannot end the subject"),
    ]  # fmt: skip
    async with place.coordinator():
        for command, body, request, complaint in cases:
            for answer in await asked(client, f"rl.v1.jobs.{command}", body, f"rl.v1.results.{request}", count=2):
                told = answer["failure"]["message"] if "failure" in answer else str(answer["errors"])
                assert complaint in told
    await client.close()


async def test_what_is_neither_json_nor_messagepack_is_called_so(place: Place, bus: Bus) -> None:
    async with place.coordinator():
        await bus.client.jetstream().publish("rl.v1.jobs.submit", b"train my model, please")
        async for delivery in bus.follow(topology.DEAD_LETTERS):
            assert "neither a JSON object nor a MessagePack map" in delivery.message.reason
            assert "train my model" in delivery.message.reason
            break


async def test_a_request_that_is_repeated_makes_one_job_also_after_a_restart(
    place: Place, bus: Bus, nats_server: Any
) -> None:
    client = await nats.connect(nats_server.url)
    body = json.dumps({"spec": job(), "request_id": "mine"}).encode()
    wrong = json.dumps({"spec": job(name=3), "request_id": "mine"}).encode()
    submit_, answers = "rl.v1.jobs.submit", "rl.v1.results.mine"
    async with mesh(place):
        refused = await asked(client, submit_, wrong, answers, count=2)
        first = await asked(client, submit_, body, answers, count=2)
    async with place.coordinator():
        again = await asked(client, submit_, body, answers)
    await client.close()
    assert [answer["job"] for answer in refused] == [None, None], "what was refused may be mended and asked again"
    assert len({answer["job"] for answer in first + again}) == 1
    assert [entry.key[0] for entry in await bus.table(topology.JOB_RECORDS).items()] == [first[0]["job"]]


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
        with pytest.raises(Exception, match="was cancelled already"):
            await command(topology.CANCEL, answer.job)
        with pytest.raises(Exception, match="there is no job 'nobody'"):
            await command(topology.CANCEL, "nobody")


async def test_a_finished_job_is_deleted_with_everything_that_it_left(place: Place, bus: Bus) -> None:
    async def delete(job_id: str) -> None:
        await bus.ask(topology.DELETE, ControlJob(job=job_id, request_id=bus.new_request()), timeout=20)

    async with mesh(place):
        kept, gone = await finished(bus, job()), await finished(bus, job(name="gone"))
        running_ = await submit(bus, job(name="long", algorithm={"steps": 500}))
        assert running_.job is not None
        with pytest.raises(UserError, match=f"cancel it first, `openrl cancel {running_.job}`"):
            await delete(running_.job)
        await delete(gone.job)
        with pytest.raises(UserError, match="there is no job"):
            await delete(gone.job)
    assert not [path for path in place.directory.rglob("*") if path.is_file() and gone.job in str(path)]
    assert Path(kept.adapter).exists()
    assert {entry.key[0] for entry in await bus.table(topology.JOB_RECORDS).items()} == {kept.job, running_.job}
    assert not [entry for entry in await bus.table(topology.POLICIES).items() if entry.key[0] == gone.run]
    assert await bus.last_place(topology.JOB_PROGRESS, job=gone.job) == 0


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
        entry = await jobs.get(answer.job)
        assert entry is not None
        earlier = msgspec.structs.replace(entry.value, step_began=entry.value.step_began - 1000)
        await jobs.update(answer.job, earlier, entry.revision)
        async with place.coordinator(replica="coordinator-2"):
            record = await ended(bus, answer.job)
            table = await rows(bus, record.job)
    assert record.phase == "succeeded"
    assert [row["step"] for row in table] == list(range(1, 9)), "every step was told of, and once"
    lines = list(map(json.loads, (place.directory / "jobs" / f"{record.job}.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 9))
    (long,) = [line for line in lines if line["kind"] == "step" and line["seconds"] >= 1000]
    assert long["step"] == entry.value.step + 1, "the step that began before the restart"


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
