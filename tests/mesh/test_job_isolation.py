"""Jobs do not harm each other: whatever becomes of one, the coordinator goes on with the others, and answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from services.coordinator import policy
from services.coordinator.asking import Asking
from services.coordinator.limits import MOST_GROUPS_OUT
from services.coordinator.records import Records
from services.coordinator.service import CoordinatorService
from shared import topology, wire
from shared.bus import Bus
from shared.contracts.episodes import EnvironmentSpec, GroupKey, PlayGroup, RewardSpec
from shared.contracts.jobs import AlgorithmSpec, ControlJob, Evaluation, EvaluationSpec, JobRecord, JobSpec
from shared.contracts.replicas import ReplicaRecord
from shared.errors import TemporaryError
from shared.leases import Leases
from shared.node import Node
from shared.topology import Channel
from tests.mesh.fake_checks import approving
from tests.mesh.fake_player import FakePlayer
from tests.mesh.harness import MODEL, Place, eventually
from tests.mesh.test_jobs import job, submit


@pytest.fixture(autouse=True)
def _workers_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.queues.FETCH_SECONDS", 0.1)


def record(name: str, *, groups: int = 2, tasks: int = 0, **fields: Any) -> JobRecord:
    spec = JobSpec(
        name=name,
        base_model=MODEL,
        environment=EnvironmentSpec(name="arithmetic"),
        reward=RewardSpec(name="exact_match"),
        algorithm=AlgorithmSpec(groups_per_step=groups),
        evaluation=EvaluationSpec(tasks=tasks),
    )
    return JobRecord(job=name, run=name, spec=spec, **fields)


async def add(bus: Bus, job_record: JobRecord) -> str:
    assert await bus.table(topology.JOB_RECORDS).create(job_record.job, job_record) is not None
    return job_record.job


async def cancel(bus: Bus, name: str) -> None:
    await bus.ask(topology.CANCEL, ControlJob(job=name, request_id=bus.new_request()), timeout=20)


async def reached(bus: Bus, name: str, phase: str) -> JobRecord:
    jobs = bus.table(topology.JOB_RECORDS)

    async def look() -> JobRecord | None:
        entry = await jobs.get(name)
        return entry.value if entry and entry.value.phase == phase else None

    return await eventually(look)


async def groups_asked_for(bus: Bus) -> int:
    """As long as nobody plays them; afterwards 0."""
    return await bus.last_place(topology.GROUPS)


async def announce(bus: Bus) -> None:
    """Say that all services are there."""
    replicas = bus.table(topology.REPLICAS)
    offers = {"environment": ["environment:arithmetic"], "reward": ["reward:length_penalty"]}
    for service in ("environment", "reward", "sampler", "trainer"):
        model = MODEL if service in ("sampler", "trainer") else None
        entry = ReplicaRecord(
            replica=service, service=service, pid=1, host="h", metrics_port=1, ready=True, base_model=model,
            offers=offers.get(service, []),
        )  # fmt: skip
        await replicas.put(service, entry)


# -- one job cannot end the others -----------------------------------------------------------------------------------


async def test_a_job_whose_driving_raises_is_failed_with_the_reason_and_others_go_on(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = Records.create_run

    async def fails_for_one(records: Records) -> None:
        if records.job == "bad":
            raise LookupError("the moon is in the wrong place")
        await create(records)

    monkeypatch.setattr(Records, "create_run", fails_for_one)
    async with place.coordinator():
        bad, good = await add(bus, record("bad")), await add(bus, record("good"))
        assert (await reached(bus, bad, "failed")).reason == "LookupError: the moon is in the wrong place"
        await reached(bus, good, "running")
        await cancel(bus, good)
        await reached(bus, good, "cancelled")
    assert "Traceback" in caplog.text


async def test_a_job_whose_own_task_raises_is_failed_too(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Asking) -> list[Any]:
        raise ZeroDivisionError("of a task")

    monkeypatch.setattr(Asking, "lost", broken)
    async with place.coordinator():
        assert (await reached(bus, await add(bus, record("bad")), "failed")).reason == "ZeroDivisionError: of a task"


async def test_a_job_that_cannot_even_be_begun_holds_up_nobody(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = policy.indexes_asked_for

    def fails_for_one(job_record: JobRecord) -> set[int]:
        if job_record.job == "bad":
            raise OverflowError("too far")
        return read(job_record)

    monkeypatch.setattr(policy, "indexes_asked_for", fails_for_one)
    async with place.coordinator() as (service, _):
        await add(bus, record("bad"))
        await reached(bus, await add(bus, record("good")), "running")

        async def said() -> bool | None:
            return True if "claiming job bad failed" in caplog.text else None

        await eventually(said)
        assert isinstance(service, CoordinatorService)
        assert service._jobs._leases.held == {("job", "good")}


async def test_what_may_pass_is_tried_again_after_a_rest(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, tries = Records.create_run, 0

    async def away_at_first(records: Records) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise TemporaryError("the bus is away")
        await create(records)

    monkeypatch.setattr(Records, "create_run", away_at_first)
    monkeypatch.setattr(policy, "MOST_REST", 0.01)
    async with place.coordinator():
        await add(bus, record("late"))
        await eventually(lambda: some(bus, "late"))
    assert tries == 3


async def some(bus: Bus, name: str) -> bool | None:
    entry = await bus.table(topology.JOB_RECORDS).get(name)
    return True if entry and entry.value.asked else None


async def test_a_job_that_can_no_longer_be_written_down_keeps_nobody_from_anything(
    place: Place, bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    full = record("full", evaluations=[Evaluation(step=1, accuracy=0.5, tasks=4)] * 5_000)
    spare = (1 << 20) - len(wire.encode(full, json=True)) - 56
    full = record("full", evaluations=full.evaluations, adapter="x" * spare)
    async with place.coordinator():
        await add(bus, full)

        async def said() -> bool | None:
            return True if "job full could not be failed" in caplog.text else None

        await eventually(said)
        good = await add(bus, record("good"))
        await reached(bus, good, "running")
        await cancel(bus, good)
        await reached(bus, good, "cancelled")
    assert "is over the 1048576 bytes that the bus takes" in caplog.text


async def test_leases_that_cannot_be_released_do_not_hold_up_the_end(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def away(*_: Any) -> None:
        raise TemporaryError("the bus is away")

    async with place.coordinator():
        await reached(bus, await add(bus, record("job")), "running")
        monkeypatch.setattr(Leases, "release", away)
    assert "the lease of job job was not released" in caplog.text


async def test_an_entry_that_is_no_job_is_passed_over(place: Place, bus: Bus) -> None:
    await bus.stream_context.publish("$KV.jobs.nonsense", b'{"job": 3}')
    async with place.coordinator():
        await reached(bus, await add(bus, record("job")), "running")


# -- one job does not crowd out the others ---------------------------------------------------------------------------


async def test_the_largest_job_is_cancelled_at_once_and_others_are_answered_meanwhile(place: Place, bus: Bus) -> None:
    largest = job(
        name="largest",
        algorithm={"steps": 10**6, "group_size": 16, "groups_per_step": 4096, "max_staleness": 3},
        evaluation={"tasks": 10_000, "every": 500},
    )
    async with approving(bus), place.coordinator(group_window=100, evaluation_window=50):
        await announce(bus)
        answer = await submit(bus, largest)
        assert answer.job is not None, answer.errors

        async def all_asked_for() -> bool | None:
            entry = await bus.table(topology.JOB_RECORDS).get(answer.job or "")
            decided = entry is not None and entry.value.asked == [(0, MOST_GROUPS_OUT - 1)]
            return True if decided and await groups_asked_for(bus) == 150 else None

        await eventually(all_asked_for)
        await announce(bus)
        small = (await submit(bus, job(name="small"))).job
        assert small is not None

        async def small_asks() -> bool | None:
            return True if await groups_asked_for(bus) == 150 + 4 + 4 else None  # two steps, and an evaluation

        await eventually(small_asks)
        await cancel(bus, answer.job)
        await reached(bus, answer.job, "cancelled")
        await cancel(bus, small)
        await reached(bus, small, "cancelled")
    assert await groups_asked_for(bus) == 158


async def test_a_wish_is_obeyed_and_waiting_is_told_once_while_groups_cannot_be_asked_for(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with place.coordinator() as (_, node):
        tries = keep_from_publishing_groups(node, monkeypatch)
        name = await add(bus, record("stuck", groups=30, tasks=30))

        async def tried_often() -> bool | None:
            return True if len(tries) > 200 else None

        await eventually(tried_often)
        await cancel(bus, name)
        await reached(bus, name, "cancelled")
    assert caplog.text.count("job stuck waits: the bus is full") == 1
    assert caplog.text.count("job stuck waits no longer") == 1


def keep_from_publishing_groups(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[PlayGroup]:
    store, tries = node.bus.publish, []

    async def refused(channel: Channel[Any], message: Any, **kwargs: Any) -> int:
        if channel is topology.GROUPS:
            tries.append(message)
            raise TemporaryError("the bus is full", delay=0.01)
        return await store(channel, message, **kwargs)

    monkeypatch.setattr(node.bus, "publish", refused)
    return tries


async def test_evaluations_are_asked_for_in_a_window_that_survives_a_restart(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first coordinator is stopped in the middle; the second one asks only for what is not back."""
    window = {"evaluation_window": 8, "group_window": 3}
    name = await add(bus, record("evaluating", groups=5, tasks=100))

    def close_after_30(_: PlayGroup) -> None:
        if len(player.played) == 30:
            player.gate.clear()

    async with FakePlayer(bus, close_after_30) as player:

        async def played(count: int) -> None:
            async def look() -> bool | None:
                return True if len(player.played) >= count else None

            await eventually(look)

        async with place.coordinator(**window):
            await played(30)

        player.gate.set()

        async def all_back() -> bool | None:
            return True if await groups_asked_for(bus) == 0 else None

        await eventually(all_back)
        assert len(player.played) <= 30 + 8 + 3
        again = note_what_is_asked_for(monkeypatch)
        back = {group.group for group in player.played}
        async with place.coordinator(replica="coordinator-2", **window) as (service, _):
            assert isinstance(service, CoordinatorService)
            await played(110)

            async def evaluated() -> Evaluation | None:
                entry = await bus.table(topology.JOB_RECORDS).get(name)
                return entry.value.evaluations[0] if entry and entry.value.evaluations else None

            outcome = await eventually(evaluated)
    assert (outcome.tasks, outcome.failed, outcome.accuracy) == (100, 0, 1.0)
    keys = {group.group for group in player.played}
    assert len(player.played) == len(keys) == 110
    assert again == keys - back


def note_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> set[GroupKey]:
    publish = Asking.publish
    asked: set[GroupKey] = set()

    async def noted(asking: Asking, groups: Sequence[PlayGroup]) -> None:
        asked.update(group.group for group in groups)
        await publish(asking, groups)

    monkeypatch.setattr(Asking, "publish", noted)
    return asked


async def test_a_small_job_does_not_wait_for_the_evaluation_of_a_large_one(place: Place, bus: Bus) -> None:
    large = await add(bus, record("large", tasks=2000))
    order: list[str] = []

    def note(group: PlayGroup) -> None:
        order.append(group.job)

    async with place.coordinator(evaluation_window=40), FakePlayer(bus, note):

        async def some_played() -> bool | None:
            return True if len(order) > 50 else None

        await eventually(some_played)
        small = await add(bus, record("small", tasks=5))

        async def evaluated() -> bool | None:
            entry = await bus.table(topology.JOB_RECORDS).get(small)
            return True if entry and entry.value.evaluations else None

        await eventually(evaluated)
        entry = await bus.table(topology.JOB_RECORDS).get(large)
        assert entry is not None
        assert not entry.value.evaluations, "the large one is still at it"
    first = order.index("small")
    last = max(place for place, name in enumerate(order) if name == "small")
    assert last - first < 5 * 40
