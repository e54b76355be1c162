"""The example of an environment and a reward of one's own works, in both ways of registering it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import tomllib
from pathlib import Path
from typing import Any

import pytest

from services.environment import config as environment_config
from services.environment import service as environment_service
from services.environment.registry import FAMILY as ENVIRONMENTS
from services.environment.registry import Registry as Environments
from services.local.nats_server import NatsServer
from services.reward import config as reward_config
from services.reward import service as reward_service
from services.reward.registry import FAMILY as REWARDS
from services.reward.registry import Registry as Rewards
from shared import topology
from shared.bus import Bus
from shared.contracts.episodes import EnvironmentSpec, GroupKey, GroupScored, PlayGroup, RewardSpec
from shared.contracts.sampling import SamplingParams
from shared.process import running
from tests.engines.tiny import save_tokenizer
from tests.mesh.fake_sampler import FakeSampler

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_environment"


@pytest.fixture(autouse=True)
def _example_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setattr("shared.queues.FETCH_SECONDS", 0.1)


def entry_points() -> dict[str, dict[str, str]]:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    found: dict[str, dict[str, str]] = project["entry-points"]
    return found


def plugins(group: str) -> list[str]:
    return [f"{name}={target}" for name, target in entry_points()[group].items()]


async def test_a_job_can_name_the_examples_environment_and_reward(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path / "model")
    common: dict[str, Any] = {"nats_url": nats_server.url, "blob_url": str(tmp_path / "blobs"), "drain_seconds": 1}
    playing = environment_config.EnvironmentConfig(
        models={"tiny": str(tmp_path / "model")}, plugins=plugins(ENVIRONMENTS.entry_points), **common
    )
    scoring = reward_config.RewardConfig(plugins=plugins(REWARDS.entry_points), processes=1, **common)

    def script(prompt: str, number: int) -> str:
        word = prompt.split("'")[1]
        first = "Not quite." not in prompt
        return word if first and number == 1 else word[::-1]

    async with (
        running("environment", playing, environment_service.build),
        running("reward", scoring, reward_service.build),
        FakeSampler(bus, script),
    ):
        await bus.publish(topology.GROUPS, group(), environment="reverse_words")
        scored = await first(bus)
    assert scored.failure is None
    assert [rollout.failure for rollout in scored.rollouts] == [None, None]
    assert [rollout.reward for rollout in scored.rollouts] == [1.5, 1.0]
    assert [len(rollout.turns) for rollout in scored.rollouts] == [1, 2]
    assert {rollout.text for rollout in scored.rollouts} == {scored.task.answer if scored.task else None}


def group() -> PlayGroup:
    return PlayGroup(
        job="job",
        group=GroupKey(split="train", index=0),
        environment=EnvironmentSpec(name="reverse_words", params={"held_out": 2}),
        reward=RewardSpec(name="nearly", params={"first_try": 0.5}),
        base_model="tiny",
        sampling=SamplingParams(max_tokens=16),
        size=2,
    )


async def first(bus: Bus) -> GroupScored:
    async with asyncio.timeout(30):
        async for delivery in bus.follow(topology.SCORED):
            return delivery.message
    raise AssertionError("nothing was scored")


def test_the_examples_entry_points_are_what_installing_it_would_register(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [importlib.metadata.EntryPoint(name, value, group) for name, value in entry_points()[group].items()]

    monkeypatch.setattr("importlib.metadata.entry_points", installed)
    environments, rewards = Environments.load([]), Rewards.load([])
    assert "reverse_words" in environments.names
    assert "nearly" in rewards.names
    assert not environments.broken
    assert not rewards.broken
    assert environments.make(EnvironmentSpec(name="reverse_words")).size("held_out") == 4
    assert rewards.scorer("nearly", {}).mixture is False
