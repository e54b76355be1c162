"""The reward service over a real bus, with real scoring processes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.local.nats_server import NatsServer
from services.reward import processes
from services.reward.config import RewardConfig
from services.reward.service import RewardService, build
from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.base import Failure
from shared.contracts.checks import CheckAnswer, CheckReward
from shared.contracts.episodes import Episode, GroupKey, GroupScored, Message, RewardSpec, ScoreGroup, Task, Turn
from shared.contracts.policies import PolicyRef
from shared.errors import StorageFull, TemporaryError, UserError
from shared.node import Node, Service
from shared.process import running
from shared.topology import Channel
from tests.mesh.playing import counted, end_job

Started = tuple[Service, Node]
POLICY = PolicyRef(run="run", version=3)
OBEDIENT = "obedient=tests.mesh.plugin_samples:obedient"


@pytest.fixture(autouse=True)
def _workers_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.queues.FETCH_SECONDS", 0.1)


def config(server: NatsServer, tmp_path: Path, **settings: Any) -> RewardConfig:
    given: dict[str, Any] = {"plugins": [OBEDIENT, "broken=tests.mesh.plugin_samples:absent"], "processes": 2}
    return RewardConfig(
        nats_url=server.url, blob_url=str(tmp_path / "blobs"), replica="reward-test", drain_seconds=0.5,
        **(given | settings),
    )  # fmt: skip


@pytest.fixture
async def rewards(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Started]:
    async with running("reward", config(nats_server, tmp_path), build) as started:
        yield started


def episode(reply: str, **fields: Any) -> Episode:
    tokens = Int32s(list(reply.encode()))
    turn = Turn(prompt=Int32s([1, 2]), tokens=tokens, logprobs=Float32s([0.0] * len(tokens)), stop_reason="stop")
    said = [Message(role="user", content="?"), Message(role="assistant", content=reply)]
    return Episode(turns=[turn], messages=said, reply=reply, **fields)


def group(reward: str, *episodes: Episode, index: int = 0, timeout_s: float = 30.0, **params: Any) -> ScoreGroup:
    return ScoreGroup(
        job="job",
        group=GroupKey(split="train", index=index),
        reward=RewardSpec(name=reward, params=params, timeout_s=timeout_s),
        task=Task(question="What is 8 + 9?", answer="17"),
        episodes=list(episodes),
        policy=POLICY,
        play_seconds=1.5,
    )


async def publish(bus: Bus, score: ScoreGroup) -> None:
    await bus.publish(topology.PLAYED, score, reward=score.reward.name)


async def results(bus: Bus, count: int = 1) -> list[GroupScored]:
    found: list[GroupScored] = []
    async with asyncio.timeout(30):
        async for delivery in bus.follow(topology.SCORED, job="job"):
            found.append(delivery.message)
            if len(found) == count:
                break
    return found


async def scored(bus: Bus, score: ScoreGroup) -> GroupScored:
    await publish(bus, score)
    return (await results(bus))[0]


def reasons(group: GroupScored) -> list[str | None]:
    return [rollout.failure.message if rollout.failure else None for rollout in group.rollouts]


# -- scoring ---------------------------------------------------------------------------------------------------------


async def test_a_group_comes_back_with_the_reward_of_each_episode(bus: Bus, rewards: Started) -> None:
    sent = group("numeric", episode("It is 17."), episode("It is 18."), episode("17"))
    back = await scored(bus, sent)
    assert (back.job, back.group, back.policy, back.task) == ("job", sent.group, POLICY, sent.task)
    assert (back.play_seconds, back.failure) == (1.5, None)
    assert [rollout.reward for rollout in back.rollouts] == [1.0, 0.0, 1.0]
    assert [rollout.text for rollout in back.rollouts] == ["It is 17.", "It is 18.", "17"]
    assert [rollout.turns for rollout in back.rollouts] == [episode.turns for episode in sent.episodes]


async def test_a_mixture_reports_its_parts(bus: Bus, rewards: Started) -> None:
    parts = [
        {"name": "numeric", "weight": 1.0},
        {"name": "length_penalty", "weight": 0.5, "params": {"budget": 2, "per_token": 0.1}},
        {"name": "environment", "weight": 2.0},
    ]
    (rollout,) = (await scored(bus, group("weighted", episode(" 17 ", environment_reward=0.25), parts=parts))).rollouts
    assert rollout.components == pytest.approx({"numeric": 1.0, "length_penalty": -0.2, "environment": 0.25})
    assert rollout.reward == pytest.approx(1.0 - 0.1 + 0.5)


async def test_an_episode_that_was_not_played_keeps_its_reason_and_is_not_scored(bus: Bus, rewards: Started) -> None:
    why = Failure(message="environment 'x' hung", kind="user")
    back = await scored(bus, group("obedient", episode("raise", failure=why), episode("fine")))
    assert [rollout.failure for rollout in back.rollouts] == [why, None]
    assert [rollout.reward for rollout in back.rollouts] == [0.0, 0.5]


async def test_a_reward_of_ones_own_gets_its_parameters(bus: Bus, rewards: Started) -> None:
    back = await scored(bus, group("obedient", episode("print"), episode("x"), otherwise=0.75))
    assert [rollout.reward for rollout in back.rollouts] == [0.75, 0.75]


# -- single episodes fail alone --------------------------------------------------------------------------------------


async def test_an_episode_whose_reward_goes_wrong_fails_alone_with_reward_and_value(bus: Bus, rewards: Started) -> None:
    moods = ["fine", "raise", "nan", "inf", "text", "crash", "memory", "fine"]
    back = await scored(bus, group("obedient", *map(episode, moods)))
    assert back.failure is None
    assert reasons(back) == [
        None,
        "episode 1: reward 'obedient' raised LookupError: no such mood",
        "episode 2: reward 'obedient' gave nan: a reward must be a finite number",
        "episode 3: reward 'obedient' gave inf: a reward must be a finite number",
        "episode 4: reward 'obedient' gave 'good': a reward must be a finite number",
        "episode 5: reward 'obedient': the process that scored it ended with code 3",
        "episode 6: reward 'obedient' raised MemoryError: ",
        None,
    ]
    assert {rollout.failure.kind for rollout in back.rollouts if rollout.failure} == {"user"}


async def test_a_reward_that_hangs_is_ended_and_others_go_on(bus: Bus, rewards: Started) -> None:
    back = await scored(bus, group("obedient", *map(episode, ["fine", "hang", "fine"]), timeout_s=0.5))
    slow = "episode 1: reward 'obedient' was not done in timeout_s = 0.5 s: raise timeout_s, or mend what hangs"
    assert reasons(back) == [None, slow, None]
    _, node = rewards
    assert node.telemetry.registry.get_sample_value("openrl_reward_processes_ended_total") == 1


async def test_a_regular_expression_without_end_is_ended_too(bus: Bus, rewards: Started) -> None:
    # It holds the interpreter lock: only ending its process helps.
    started = time.monotonic()
    back = await scored(bus, group("regex", episode("a" * 60 + "!"), episode("b"), pattern="(a|aa)+|b", timeout_s=0.5))
    assert [reason is None for reason in reasons(back)] == [False, True]
    assert time.monotonic() - started < 20


# -- whole groups fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "params", "reason"),
    [
        ("numbers", {}, "reward 'numbers' is unknown: "),
        ("broken", {}, "reward 'broken' could not be loaded (tests.mesh.plugin_samples:absent: AttributeError"),
        ("regex", {"pattern": "("}, "pattern '(' is not a regular expression"),
        ("regex", {}, "missing required field `pattern`"),
        ("numeric", {"tolerance": -1}, "`float` >= 0.0 - at `reward.params.tolerance`"),
        ("weighted", {"parts": [{"name": "numerics"}]}, "reward 'numerics' is unknown: did you mean 'numeric'?"),
    ],
)
async def test_a_reward_that_cannot_be_used_fails_the_group(
    bus: Bus, rewards: Started, reward: str, params: dict[str, Any], reason: str
) -> None:
    back = await scored(bus, group(reward, episode("17"), **params))
    assert not back.rollouts
    assert back.failure
    assert back.failure.kind == "user"
    assert reason in back.failure.message


async def test_a_group_without_episodes_checks_the_reward_alone(bus: Bus, rewards: Started) -> None:
    await publish(bus, group("numeric"))
    await publish(bus, group("numeric", index=1, tolerance="wide"))
    fine, wrong = sorted(await results(bus, 2), key=lambda back: back.group.index)
    assert (fine.failure, fine.rollouts) == (None, [])
    assert wrong.failure
    assert "Expected `float`, got `str` - at `reward.params.tolerance`" in wrong.failure.message


async def test_a_group_that_can_never_be_scored_comes_back_failed_after_its_last_delivery(
    bus: Bus, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorers = dataclasses.replace(topology.GROUP_SCORERS, temporary_deliveries=5)
    monkeypatch.setattr(topology, "GROUP_SCORERS", scorers)
    tries = 0

    async def no_process(*_: Any) -> None:
        nonlocal tries
        tries += 1
        raise TemporaryError("no more processes", delay=0.01)

    monkeypatch.setattr(processes.Processes, "_next", no_process)
    async with running("reward", config(nats_server, tmp_path), build):
        back = await scored(bus, group("numeric", episode("17")))
    assert back.failure == Failure(message="no more processes", kind="server")
    assert tries == scorers.temporary_deliveries


async def test_a_service_that_stops_in_the_last_delivery_says_so(
    bus: Bus, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "GROUP_SCORERS", dataclasses.replace(topology.GROUP_SCORERS, temporary_deliveries=1))
    async with running("reward", config(nats_server, tmp_path), build) as (service, _):
        await publish(bus, group("obedient", episode("hang")))
        async with asyncio.timeout(10):
            while service.activity() == "idle":
                await asyncio.sleep(0.01)
    (back,) = await results(bus)
    assert back.failure
    assert "was stopped while it scored the group for the last time" in back.failure.message


async def test_a_full_bus_is_waited_for(bus: Bus, rewards: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    _, node = rewards
    store, refusals = node.bus.publish, iter([StorageFull("the bus is full", delay=0.01)] * 2)

    async def publish_when_free(channel: Channel[Any], *args: Any, **kwargs: Any) -> int:
        if channel is topology.SCORED and (full := next(refusals, None)):
            raise full
        return await store(channel, *args, **kwargs)

    monkeypatch.setattr(node.bus, "publish", publish_when_free)
    assert reasons(await scored(bus, group("numeric", episode("17")))) == [None]
    assert next(refusals, None) is None


async def test_groups_of_a_job_that_has_ended_are_dropped(bus: Bus, nats_server: NatsServer, tmp_path: Path) -> None:
    await end_job(bus, "failed")
    for index in range(5):
        await publish(bus, group("numeric", episode("17"), index=index))
    await publish(bus, msgspec.structs.replace(group("numeric", episode("17")), job="other"))
    async with running("reward", config(nats_server, tmp_path), build) as (_, node):
        await counted(node, "openrl_reward_groups_total", 5, outcome="dropped")
        await counted(node, "openrl_reward_groups_total", outcome="scored")
    assert await bus.last_place(topology.SCORED, job="job") == 0


async def test_what_is_left_of_a_group_is_not_scored_when_its_job_ends(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    async with running("reward", config(nats_server, tmp_path, processes=1), build) as (_, node):
        await publish(bus, group("obedient", episode("hang"), *[episode("fine")] * 3, timeout_s=2.0))
        async with asyncio.timeout(20):
            while not node.telemetry.registry.get_sample_value("openrl_reward_running_groups"):
                await asyncio.sleep(0.01)
        await end_job(bus, "cancelled")
        await counted(node, "openrl_reward_groups_total", outcome="dropped")
    assert await bus.last_place(topology.SCORED, job="job") == 0


# -- again, and by the way -------------------------------------------------------------------------------------------


async def test_a_group_that_is_scored_twice_is_published_once(bus: Bus, rewards: Started) -> None:
    _, node = rewards
    for index in (0, 0, 1):
        await publish(bus, group("numeric", episode("17"), index=index))
    async with asyncio.timeout(20):
        while node.telemetry.registry.get_sample_value("openrl_reward_groups_total", {"outcome": "scored"}) != 3:
            await asyncio.sleep(0.01)
    assert sorted(back.group.index for back in await results(bus, 2)) == [0, 1]
    assert await bus.last_place(topology.SCORED) == 2


async def test_the_service_offers_what_works_and_leaves_no_process_behind(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    async with running("reward", config(nats_server, tmp_path), build) as (service, _):
        assert service.offers == [
            f"reward:{name}"
            for name in (
                "environment", "exact_match", "length_penalty", "numeric", "obedient", "regex", "weighted",
            )
        ]  # fmt: skip
        assert service.activity() == "idle"
        await publish(bus, group("obedient", episode("hang")))
        async with asyncio.timeout(10):
            while service.activity() != "scoring 1 group":
                await asyncio.sleep(0.01)
        assert children()
        assert isinstance(service, RewardService)
    assert not children()


async def test_a_plugin_that_is_not_understood_keeps_the_service_from_starting(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="plugin 'mine' is not understood: write it as name=module:attribute"):
        async with running("reward", config(nats_server, tmp_path, plugins=["mine"]), build):
            raise AssertionError("never reached")
    assert not children()


async def test_whether_a_reward_can_work_is_said_before_anything_is_scored(bus: Bus, rewards: Started) -> None:
    async def errors(name: str, **params: Any) -> dict[str, str]:
        question = CheckReward(request_id=bus.new_request(), name=name, params=params, path="evaluation.reward")
        answer = await bus.ask(topology.REWARD_CHECKS, question, timeout=30)
        assert isinstance(answer, CheckAnswer)
        return {error.path: error.message for error in answer.errors}

    assert await errors("obedient", otherwise=1.0) == {}
    assert list(await errors("obedient", other=1.0)) == ["evaluation.reward.params.other"]
    assert "not a regular expression" in (await errors("regex", pattern="("))["evaluation.reward.params"]
    assert list(await errors("weighted")) == ["evaluation.reward.params.parts"]


def children() -> list[int]:
    """Scoring processes of this process."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if _is_scorer(pid)]


def _is_scorer(pid: int) -> bool:
    try:
        status, command = Path(f"/proc/{pid}/stat").read_text(), Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[1] == str(os.getpid()) and "services.reward.child" in command
