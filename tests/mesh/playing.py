"""Steps that tests of the environment service share: a running service, groups to play, what comes back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

from services.environment.config import EnvironmentConfig
from services.environment.service import build
from services.local.nats_server import NatsServer
from shared import topology
from shared.bus import Bus
from shared.contracts.episodes import EnvironmentSpec, Episode, GroupKey, PlayGroup, RewardSpec, ScoreGroup
from shared.contracts.jobs import JobPhase, JobRecord, JobSpec
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SamplingParams
from shared.node import Node, Service
from shared.process import running
from shared.topology import Channel

T = TypeVar("T")
PLUGINS = {"capitals": "capitals", "flaky": "flaky", "moody": "Moody", "slow_task": "SlowTask", "broken": "absent"}
"""Of `tests.mesh.plugin_samples`; the last one is not there."""
POLICY = PolicyRef(run="run", version=3)


@contextlib.asynccontextmanager
async def service(
    server: NatsServer, tmp_path: Path, tokenizer: str, **settings: Any
) -> AsyncIterator[tuple[Service, Node]]:
    config = EnvironmentConfig(
        nats_url=server.url,
        blob_url=str(tmp_path / "blobs"),
        replica="environment-test",
        models={"tiny": tokenizer, "no_tokenizer": str(tmp_path)},
        plugins=[f"{name}=tests.mesh.plugin_samples:{target}" for name, target in PLUGINS.items()],
        drain_seconds=0.5,
        **settings,
    )
    async with running("environment", config, build) as started:
        yield started


def group(environment: str, index: int = 0, *, timeout_s: float = 60.0, size: int = 2, **fields: Any) -> PlayGroup:
    given: dict[str, Any] = {"params": {}, "split": "train", "base_model": "tiny", "policy": POLICY} | fields
    return PlayGroup(
        job="job",
        group=GroupKey(split=given.pop("split"), index=index),
        environment=EnvironmentSpec(name=environment, params=given.pop("params"), episode_timeout_s=timeout_s),
        reward=RewardSpec(name="numeric"),
        sampling=SamplingParams(max_tokens=32, temperature=0.5),
        size=size,
        **given,
    )


async def publish(bus: Bus, play: PlayGroup) -> None:
    await bus.publish(topology.GROUPS, play, environment=play.environment.name)


async def messages(bus: Bus, channel: Channel[T], count: int = 1) -> list[T]:
    found: list[T] = []
    async with asyncio.timeout(30):
        async for delivery in bus.follow(channel):
            found.append(delivery.message)
            if len(found) == count:
                break
    return found


async def played(bus: Bus, play: PlayGroup) -> ScoreGroup:
    await publish(bus, play)
    return (await messages(bus, topology.PLAYED))[0]


async def failed(bus: Bus, play: PlayGroup) -> str:
    await publish(bus, play)
    scored = (await messages(bus, topology.SCORED))[0]
    assert (scored.job, scored.group, scored.policy) == (play.job, play.group, play.policy)
    assert not scored.rollouts
    assert scored.failure
    return f"{scored.failure.kind}: {scored.failure.message}"


async def end_job(bus: Bus, phase: JobPhase, job: str = "job") -> None:
    """Write down that a job has come to this phase."""
    environment, reward = EnvironmentSpec(name="capitals"), RewardSpec(name="numeric")
    spec = JobSpec(name="job", base_model="tiny", environment=environment, reward=reward)
    await bus.table(topology.JOB_RECORDS).put(job, JobRecord(job=job, spec=spec, phase=phase))


async def counted(node: Node, metric: str, count: float = 1, **labels: str) -> None:
    """Wait until a metric has this value."""
    async with asyncio.timeout(20):
        while node.telemetry.registry.get_sample_value(metric, labels) != count:
            await asyncio.sleep(0.01)


def failures(episodes: list[Episode]) -> list[str | None]:
    return [episode.failure.message if episode.failure else None for episode in episodes]


def stuck(node: Node) -> float | None:
    return node.telemetry.registry.get_sample_value("openrl_environment_stuck_calls", {"environment": "moody"})
