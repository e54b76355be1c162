"""The environment service over a real bus, with a sampler that follows a script."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
import threading
import time
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.environment import checks
from services.local.nats_server import NatsServer
from shared import observe, topology
from shared.bus import Bus
from shared.contracts.arrays import Int32s
from shared.contracts.checks import CheckAnswer, CheckEnvironment
from shared.contracts.episodes import RewardSpec, Task
from shared.contracts.jobs import JobPhase
from shared.errors import PermanentError, StorageFull
from shared.node import Node, Service
from shared.text import chat_tokenizer
from shared.topology import Channel
from tests.engines.tiny import save_tokenizer
from tests.mesh import plugin_samples
from tests.mesh.fake_sampler import IM_END, FakeSampler, reference, text_of
from tests.mesh.harness import eventually
from tests.mesh.playing import (
    POLICY,
    counted,
    end_job,
    failed,
    failures,
    group,
    messages,
    played,
    publish,
    service,
    stuck,
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return str(directory)


@pytest.fixture(autouse=True)
def _workers_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.queues.FETCH_SECONDS", 0.1)


@pytest.fixture(autouse=True)
def _hanging_calls_end_with_the_test() -> Iterator[None]:
    plugin_samples.released.clear()
    plugin_samples.closed.clear()
    plugin_samples.tries.clear()
    plugin_samples.waiting.clear()
    yield
    plugin_samples.released.set()
    plugin_samples.steps_wait.set()


@pytest.fixture
async def environments(nats_server: NatsServer, tmp_path: Path, tokenizer: str) -> AsyncIterator[tuple[Service, Node]]:
    async with service(nats_server, tmp_path, tokenizer) as started:
        yield started


Started = tuple[Service, Node]


# -- playing ---------------------------------------------------------------------------------------------------------


async def test_a_single_turn_group_is_one_request_and_comes_back_as_episodes(bus: Bus, environments: Started) -> None:
    async with FakeSampler(bus, lambda _, number: f"reply {number}") as sampler:
        score = await played(bus, group("capitals", 4, params={"country": "Peru"}, size=3, task_seed=7, owner="ann"))
    assert score.task == Task(question="train 4 7: the capital of Peru?", answer="Paris")
    assert (score.job, score.reward, score.policy, score.owner) == ("job", RewardSpec(name="numeric"), POLICY, "ann")
    assert str(score.group) == "train.4.0"
    assert score.play_seconds > 0

    (request,) = sampler.requests
    assert (request.num_samples, request.policy, request.owner, request.isolated) == (3, POLICY, "ann", False)
    assert (request.params.max_tokens, request.params.temperature) == (32, 0.5)
    assert text_of(request.prompt) == f"user\n{score.task.question}\nassistant\n"

    assert len(score.episodes) == 3
    for number, episode in enumerate(score.episodes):
        (turn,) = episode.turns
        assert list(turn.tokens) == [*f"reply {number}".encode(), IM_END]
        assert turn.prompt == request.prompt
        assert (len(turn.logprobs), turn.stop_reason, turn.reference_logprobs) == (len(turn.tokens), "stop", None)
        assert [(said.role, said.content) for said in episode.messages] == [
            ("user", score.task.question),
            ("assistant", f"reply {number}"),
        ]
        assert (episode.failure, episode.environment_reward) == (None, None)


async def test_a_reply_that_the_environment_began_is_gone_on_with(bus: Bus, environments: Started) -> None:
    async with FakeSampler(bus, lambda _, number: f" {number}") as sampler:
        score = await played(bus, group("arithmetic", params={"prefill": "{expression} ="}, size=2))
    assert score.task is not None
    begun = f"{score.task.metadata['expression']} ="
    assert text_of(sampler.requests[0].prompt) == f"user\n{score.task.question}\nassistant\n{begun}"
    assert [episode.reply for episode in score.episodes] == [" 0", " 1"]
    assert score.episodes[1].messages[-1].content == f"{begun} 1"


async def test_a_conversation_keeps_the_sampled_tokens_and_ends_with_the_environments_reward(
    bus: Bus, environments: Started, tokenizer: str
) -> None:
    def search(prompt: str, number: int) -> str | bytes:
        """Halve what is left. The second guess is cut off: its turn is ended by the template."""
        low, high = 1, 100
        said = prompt.split("assistant\n")[1:]
        for guess, answer in ((int(part.split("user")[0]), part) for part in said if part):
            low, high = (guess + 1, high) if "higher" in answer else (low, guess - 1)
        text = str((low + high) // 2)
        return text.encode() if prompt.count("assistant") == 2 else text

    async with FakeSampler(bus, search) as sampler:
        score = await played(bus, group("guess_number", size=1, isolated=True))
    (episode,) = score.episodes
    assert score.task
    assert episode.turns[-1].tokens[:-1].tolist() == list((score.task.answer or "").encode())
    assert episode.environment_reward == 1.0
    assert all(request.isolated for request in sampler.requests)
    assert len(episode.turns) == len(sampler.requests) > 2

    text = chat_tokenizer(tokenizer)
    for earlier, later in zip(episode.turns, episode.turns[1:], strict=False):
        assert list(later.prompt)[: len(earlier.prompt) + len(earlier.tokens)] == [*earlier.prompt, *earlier.tokens]
    # This template is consistent, so what the policy saw is also what rendering the conversation gives.
    assert list(episode.turns[-1].prompt) == text.render(episode.messages[:-1])


async def test_every_request_has_a_seed_of_its_own_and_a_job_that_runs_again_the_same(
    bus: Bus, environments: Started
) -> None:
    async with FakeSampler(bus, lambda prompt, _: "stop" if prompt.count("And?") == 1 else "go on") as sampler:
        for index in (0, 0, 1):
            await publish(bus, group("moody", index, task_seed=5))
        async with asyncio.timeout(30):
            while len(sampler.requests) < 9:
                await asyncio.sleep(0.01)
    seeds = [request.params.seed for request in sampler.requests]
    assert None not in seeds
    assert len(set(seeds)) == 6


async def test_reference_logprobs_are_those_of_the_sampled_tokens_under_the_base_model(
    bus: Bus, environments: Started
) -> None:
    async with FakeSampler(bus, lambda prompt, _: "bye" if "And?" in prompt else "go on") as sampler:
        score = await played(bus, group("moody", reference_logprobs=True, isolated=True))
    for episode in score.episodes:
        assert len(episode.turns) == 2
        for turn in episode.turns:
            whole = Int32s([*turn.prompt, *turn.tokens])
            assert turn.reference_logprobs == reference(whole)[len(turn.prompt) :]
    scoring = [request for request in sampler.requests if request.prompt_logprobs]
    assert [(r.policy, r.params.max_tokens, r.num_samples, r.isolated) for r in scoring] == [(None, 0, 1, True)] * 4


async def test_held_out_groups_play_the_held_out_tasks_in_order(bus: Bus, environments: Started) -> None:
    params = {"max": 9, "held_out": 5}
    async with FakeSampler(bus, lambda *_: "1"):
        for index in range(5):
            await publish(bus, group("arithmetic", index, split="held_out", params=params, size=1, task_seed=index))
        scores = await messages(bus, topology.PLAYED, 5)
        await publish(bus, group("arithmetic", 5, split="held_out", params=params))
        (refused,) = await messages(bus, topology.SCORED)
    assert len({score.task.question for score in scores if score.task}) == 5
    assert refused.failure
    assert refused.failure.kind == "user"
    assert "set evaluation.tasks to 5 or less" in refused.failure.message


async def test_steps_without_end_stop_at_the_environments_last_turn_and_rewards_add_up(
    bus: Bus, environments: Started
) -> None:
    async with FakeSampler(bus, lambda *_: "go on"):
        (episode,) = (await played(bus, group("moody", size=1))).episodes
    assert (len(episode.turns), episode.environment_reward, episode.failure) == (3, 0.75, None)
    assert plugin_samples.closed == [["go on"] * 3]


# -- single episodes fail alone --------------------------------------------------------------------------------------


async def test_an_episode_that_goes_wrong_fails_alone_with_the_reason(bus: Bus, environments: Started) -> None:
    moods = ["fine", "raise", "lie", "nan", "go on"]
    async with FakeSampler(bus, lambda prompt, n: "raise" if "And?" in prompt else moods[n]):
        episodes = (await played(bus, group("moody", size=5))).episodes
    assert failures(episodes) == [
        None,
        "environment 'moody' raised LookupError in step() of turn 0: no such mood",
        "environment 'moody' in turn 0 returned None: step() must return a Step",
        "environment 'moody' in turn 0 gave the reward nan: a finite number or None is needed",
        "environment 'moody' raised LookupError in step() of turn 1: no such mood",
    ]
    assert len(plugin_samples.closed) == 5


async def test_a_hanging_episode_fails_alone_and_delays_neither_others_nor_the_end(
    bus: Bus, nats_server: NatsServer, tmp_path: Path, tokenizer: str
) -> None:
    async with (
        service(nats_server, tmp_path, tokenizer) as (_, node),
        FakeSampler(bus, lambda _, n: ["fine", "hang", "fine"][n]),
    ):
        episodes = (await played(bus, group("moody", size=3, timeout_s=0.5))).episodes
        hanging = stuck(node)
    why = "environment 'moody' was not done in episode_timeout_s = 0.5 s (it was in step() of turn 0)"
    assert failures(episodes) == [None, f"{why}: raise episode_timeout_s, or mend what hangs", None]
    assert hanging == 1
    assert plugin_samples.closed == [["fine"], ["fine"]]
    assert any(thread.name == "environment:moody" for thread in threading.enumerate())


async def test_an_environment_that_hangs_too_often_is_not_called_until_calls_come_back(
    bus: Bus, nats_server: NatsServer, tmp_path: Path, tokenizer: str
) -> None:
    async with service(nats_server, tmp_path, tokenizer, max_stuck=2) as (_, node), FakeSampler(bus, lambda *_: "hang"):
        await played(bus, group("moody", size=2, timeout_s=0.2))
        assert "'moody' has 2 calls that hang and is not called again" in await failed(bus, group("moody", 1))
        plugin_samples.released.set()
        async with asyncio.timeout(10):
            while stuck(node):
                await asyncio.sleep(0.01)
        await publish(bus, group("moody", 2))
        _, score = await messages(bus, topology.PLAYED, 2)
        assert not any(failures(score.episodes))


async def test_an_episode_without_an_answer_from_the_samplers_in_time_fails_alone(
    bus: Bus, environments: Started
) -> None:
    def script(prompt: str, number: int) -> str | None:
        return None if "And?" in prompt else ["fine", "go on"][number]

    async with FakeSampler(bus, script):
        fine, waited = failures((await played(bus, group("moody", timeout_s=0.5))).episodes)
    assert fine is None
    assert "(it was waiting for the samplers in turn 1)" in (waited or "")
    assert sorted(map(str, plugin_samples.closed)) == ["['fine']", "['go on']"]


async def test_a_refusal_by_the_samplers_in_a_later_turn_fails_that_episode(bus: Bus, environments: Started) -> None:
    def script(prompt: str, number: int) -> str:
        if "And?" in prompt:
            raise PermanentError("the prompt is too long for the model")
        return ["fine", "go on"][number]

    async with FakeSampler(bus, script):
        episodes = (await played(bus, group("moody"))).episodes
    assert failures(episodes) == [None, "the prompt is too long for the model"]


# -- whole groups fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "fields", "reason"),
    [
        ("nowhere", {}, "user: environment 'nowhere' is unknown: There are arithmetic, capitals, flaky"),
        ("broken", {}, "user: environment 'broken' could not be loaded (tests.mesh.plugin_samples:absent: Attribute"),
        ("arithmetic", {"params": {"operand": 2}}, "user: environment 'arithmetic' has no parameter 'operand'"),
        ("arithmetic", {"params": {"max": "9"}}, "user: environment 'arithmetic': Expected `int | array`, got `str`"),
        ("arithmetic", {"params": {"max": 3}}, "user: environment 'arithmetic' has only 16 expressions"),
        (
            "guess_number",
            {"params": {"held_out": 0}, "split": "held_out"},
            "user: environment 'guess_number' has no held",
        ),
        ("capitals", {"base_model": "other"}, "user: the environment service knows no tokenizer of base model 'other'"),
        ("capitals", {"base_model": "no_tokenizer"}, "has no tokenizer: put tokenizer.json"),
        (
            "slow_task",
            {"timeout_s": 0.2},
            "user: environment 'slow_task' was not done in episode_timeout_s = 0.2 s (it ",
        ),
    ],
)
async def test_a_group_that_cannot_be_played_comes_back_with_the_reason(
    bus: Bus, environments: Started, environment: str, fields: dict[str, Any], reason: str
) -> None:
    assert reason in await failed(bus, group(environment, **fields))


async def test_a_refusal_by_the_samplers_fails_the_group(bus: Bus, environments: Started) -> None:
    def script(prompt: str, number: int) -> str:
        raise PermanentError("policy run@3 is not there")

    async with FakeSampler(bus, script):
        assert await failed(bus, group("capitals")) == "server: policy run@3 is not there"


async def test_what_is_worth_trying_again_is_tried_again(bus: Bus, environments: Started) -> None:
    async with FakeSampler(bus, lambda *_: "yes"):
        score = await played(bus, group("flaky", params={"failures": 3}))
    assert not any(failures(score.episodes))
    assert len(plugin_samples.tries) == 4


async def test_a_group_that_never_works_comes_back_failed_after_its_last_delivery(
    bus: Bus, nats_server: NatsServer, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    players = dataclasses.replace(topology.GROUP_PLAYERS, temporary_deliveries=5)
    monkeypatch.setattr(topology, "GROUP_PLAYERS", players)
    async with service(nats_server, tmp_path, tokenizer):
        assert await failed(bus, group("flaky", params={"failures": 99})) == "server: the data base is away"
        (letter,) = await messages(bus, topology.DEAD_LETTERS)
    assert len(plugin_samples.tries) == players.temporary_deliveries
    assert letter.reason == "the data base is away"


async def test_a_service_that_stops_in_the_last_delivery_says_so(
    bus: Bus, nats_server: NatsServer, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "GROUP_PLAYERS", dataclasses.replace(topology.GROUP_PLAYERS, temporary_deliveries=1))
    async with service(nats_server, tmp_path, tokenizer) as (running_service, _):
        await publish(bus, group("slow_task"))
        async with asyncio.timeout(10):
            while running_service.activity() == "idle":
                await asyncio.sleep(0.01)
    (scored,) = await messages(bus, topology.SCORED)
    assert scored.failure
    assert "was stopped while it played the group for the last time" in scored.failure.message


async def test_a_full_bus_is_waited_for(bus: Bus, environments: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    _, node = environments
    store, refusals = node.bus.publish, iter([StorageFull("the bus is full", delay=0.01)] * 2)

    async def publish_when_free(channel: Channel[Any], *args: Any, **kwargs: Any) -> int:
        if channel is topology.PLAYED and (full := next(refusals, None)):
            raise full
        return await store(channel, *args, **kwargs)

    monkeypatch.setattr(node.bus, "publish", publish_when_free)
    async with FakeSampler(bus, lambda *_: "yes"):
        assert not any(failures((await played(bus, group("capitals"))).episodes))
    assert next(refusals, None) is None


# -- nobody waits any more -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["cancelled", "failed", "succeeded"])
async def test_groups_of_a_job_that_has_ended_are_dropped_and_those_of_others_played(
    bus: Bus, environments: Started, phase: JobPhase
) -> None:
    _, node = environments
    await end_job(bus, "running")
    await publish(bus, group("capitals", 0))
    async with FakeSampler(bus, lambda *_: "yes") as sampler:
        await messages(bus, topology.PLAYED)
        await end_job(bus, phase)
        await eventually(lambda: dropped(bus, node))
        asked = len(sampler.requests)
        await publish(bus, msgspec.structs.replace(group("capitals", 1), job="other"))
        await messages(bus, topology.PLAYED, 2)
        assert len(sampler.requests) == asked + 1
    assert await bus.last_place(topology.DEAD_LETTERS) == 0


async def dropped(bus: Bus, node: Node, environment: str = "nowhere") -> bool | None:
    """The service hears of the end a moment later, so groups are sent until one is dropped; others fail."""
    await publish(bus, group(environment, 9, timeout_s=0.05))
    found = node.telemetry.registry.get_sample_value("openrl_environment_groups_total", {"outcome": "dropped"})
    return True if found else None


async def test_a_service_that_starts_knows_which_jobs_have_ended(
    bus: Bus, nats_server: NatsServer, tmp_path: Path, tokenizer: str
) -> None:
    await end_job(bus, "cancelled")
    for index in range(20):
        await publish(bus, group("capitals", index))
    async with service(nats_server, tmp_path, tokenizer) as (_, node), FakeSampler(bus, lambda *_: "yes") as sampler:
        await counted(node, "openrl_environment_groups_total", 20, outcome="dropped")
    assert sampler.requests == []


async def test_a_job_that_ends_in_the_middle_of_an_episode_gets_no_further_turns(
    bus: Bus, environments: Started
) -> None:
    _, node = environments
    plugin_samples.steps_wait.clear()
    async with FakeSampler(bus, lambda *_: "wait and go on") as sampler:
        await publish(bus, group("moody"))
        async with asyncio.timeout(20):
            while len(plugin_samples.waiting) < 2:
                await asyncio.sleep(0.01)
        await end_job(bus, "cancelled")
        # Of further groups it can be seen that the service has heard of it.
        await eventually(lambda: dropped(bus, node, "slow_task"))
        plugin_samples.steps_wait.set()
        await counted(node, "openrl_environment_running_groups", 0)
    assert plugin_samples.closed, "at least the one that found out; the other may have been in its step"
    assert len(sampler.requests) == 1
    assert await bus.last_place(topology.PLAYED) == 0


# -- again, and by the way -------------------------------------------------------------------------------------------


async def test_a_line_about_a_failing_environment_says_which_group_it_was(
    bus: Bus, environments: Started, caplog: pytest.LogCaptureFixture
) -> None:
    formatter = observe.JsonFormatter("environment", "environment-test")
    lines: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(formatter.format(record)))

    keep = Keep()
    logging.getLogger("services.environment").addHandler(keep)
    try:
        async with FakeSampler(bus, lambda *_: "raise"):
            await played(bus, group("moody", 3, size=1))
    finally:
        logging.getLogger("services.environment").removeHandler(keep)
    (line,) = [line for line in lines if "failed in step()" in line["message"]]
    assert (line["job"], line["group"]) == ("job", "train.3.0")


async def test_the_time_of_an_episode_includes_its_first_reply(bus: Bus, environments: Started) -> None:
    """The sampler answers only when the clock has gone on."""
    _, node = environments
    clock = time.monotonic

    def script(*_: Any) -> str:
        patch.setattr("services.environment.player.time", types.SimpleNamespace(monotonic=lambda: clock() + 1000))
        return "yes"

    with pytest.MonkeyPatch.context() as patch:
        async with FakeSampler(bus, script):
            await played(bus, group("capitals", size=1))
    seconds = node.telemetry.registry.get_sample_value(
        "openrl_environment_episode_seconds_sum", {"environment": "capitals"}
    )
    assert seconds is not None
    assert seconds >= 1000


async def test_a_group_that_is_played_twice_is_published_once(bus: Bus, environments: Started) -> None:
    async with FakeSampler(bus, lambda *_: "yes") as sampler:
        for index in (0, 0, 1):
            await publish(bus, group("capitals", index))
        found = await messages(bus, topology.PLAYED, 2)
        async with asyncio.timeout(10):
            while len(sampler.requests) < 3:
                await asyncio.sleep(0.01)
    assert sorted(str(score.group) for score in found) == ["train.0.0", "train.1.0"]


async def test_the_service_offers_what_works_and_says_what_it_does(bus: Bus, environments: Started) -> None:
    running_service, node = environments
    assert running_service.offers == [
        f"environment:{name}"
        for name in ("arithmetic", "capitals", "flaky", "guess_number", "moody", "reasoning_gym", "slow_task")
    ]
    assert running_service.activity() == "idle"
    for index in range(2):
        await publish(bus, group("moody", index, size=1))
    async with asyncio.timeout(10):
        while running_service.activity() != "playing 2 groups":
            await asyncio.sleep(0.01)
    async with FakeSampler(bus, lambda *_: "bye"):
        await messages(bus, topology.PLAYED, 2)
        async with asyncio.timeout(10):
            while running_service.activity() != "idle":
                await asyncio.sleep(0.01)
    registry = node.telemetry.registry
    assert registry.get_sample_value(
        "openrl_environment_episodes_total", {"environment": "moody", "outcome": "played"}
    ) == 2  # fmt: skip
    assert registry.get_sample_value("openrl_environment_running_groups") == 0


@pytest.mark.parametrize(
    ("name", "params", "held_out", "path", "wrong"),
    [
        ("capitals", {}, 4, "", ""),
        ("capitals", {"county": "Wales"}, 0, "environment.params.county", "did you mean 'country'?"),
        ("broken", {}, 0, "environment.name", "could not be loaded"),
        ("arithmetic", {"min": 9, "max": 1}, 0, "environment.params", "min must not be above max"),
        ("arithmetic", {"held_out": 4}, 5, "evaluation.tasks", "set evaluation.tasks to 4 or less"),
        ("reasoning_gym", {"dataset": "leg_countin"}, 0, "environment.params", "the closest .* leg_counting"),
        (
            "reasoning_gym",
            {"dataset": "leg_counting", "config": {"max_animals": -1}},
            0,
            "environment.params",
            "refuses config",
        ),
        ("flaky", {"failures": 1}, 0, "", ""),
        ("slow_task", {}, 0, "environment.params", "was not done with task"),
    ],
)
async def test_whether_an_environment_can_work_is_said_before_anything_is_played(
    bus: Bus,
    environments: Started,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    params: dict[str, Any],
    held_out: int,
    path: str,
    wrong: str,
) -> None:
    monkeypatch.setattr(checks, "CALL_SECONDS", 0.2 if name == "slow_task" else 15.0)
    question = CheckEnvironment(request_id=bus.new_request(), name=name, params=params, held_out=held_out)
    answer = await bus.ask(topology.ENVIRONMENT_CHECKS, question, timeout=30)
    assert isinstance(answer, CheckAnswer)
    assert [error.path for error in answer.errors] == ([path] if path else [])
    assert re.search(wrong, answer.errors[0].message if answer.errors else "")
