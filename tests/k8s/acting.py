"""A cluster behind a fake API server with actuators on it: a helper of the tests of the Kubernetes actuator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from kubernetes.aio.client import Configuration

from services.autoscaler.actuator import Cluster
from services.autoscaler.config import GroupConfig, ScalingConfig
from services.autoscaler.kubernetes.actuator import KubernetesActuator
from services.autoscaler.kubernetes.config import KubernetesConfig
from services.autoscaler.observed import Load, Observed
from services.autoscaler.plan import Drain, Memory, Plan, Start
from services.autoscaler.policy import decide
from shared.errors import TemporaryError
from shared.tasks import Tasks
from tests.k8s.fake_api import FakeApi
from tests.k8s.fake_cluster import NAMESPACE, FakeCluster

T = TypeVar("T")
SCALING = ScalingConfig()


class Acting:
    """Actuators, the cluster they act on, and a plan's memory."""

    def __init__(self, api: FakeApi, url: str, tasks: Tasks) -> None:
        self.api, self.cluster = api, FakeCluster(api)
        self._url, self._tasks = url, tasks
        self._actuators: list[KubernetesActuator] = []
        self.groups: Sequence[GroupConfig] = ()
        self.memory = Memory()
        self.now = 0.0

    async def actuator(
        self, groups: Sequence[GroupConfig], name: str = "one", drain: float = 8.0, lead: bool = True, **config: Any
    ) -> KubernetesActuator:
        settings: dict[str, Any] = {"namespace": NAMESPACE, "watch_seconds": 1, "stale_seconds": 1.5, **config}
        self.groups = groups
        made = KubernetesActuator(
            KubernetesConfig(**settings), groups, name, drain, self._tasks, Configuration(host=self._url)
        )
        await made.start()
        self._actuators.append(made)
        if lead:
            assert await made.lead()
            await self.looked(made, lambda cluster: True)
        return made

    async def looked(self, actuator: KubernetesActuator, that: Callable[[Cluster], bool]) -> Cluster:
        """What is seen, as soon as it is like that."""
        return await eventually(lambda: self._look(actuator, that), "the actuator does not see it")

    async def _look(self, actuator: KubernetesActuator, that: Callable[[Cluster], bool]) -> Cluster | None:
        try:
            cluster = await actuator.look()
        except TemporaryError:
            return None
        return cluster if that(cluster) else None

    async def up_to_date(self, actuator: KubernetesActuator) -> Cluster:
        """What is seen when everything that happened has been heard of."""
        here = self.api.store.objects
        pods = {
            one["metadata"]["name"]: one["metadata"]["resourceVersion"]
            for (kind, _), one in here.items()
            if kind[1] == "pods"
        }

        def same(cluster: Cluster) -> bool:
            caches = {cache._resource.plural: cache._objects for cache in _caches(actuator)}
            return all(
                {name: one["metadata"]["resourceVersion"] for name, one in caches[plural].items()}
                == {name: one["metadata"]["resourceVersion"] for (kind, name), one in here.items() if kind[1] == plural}
                for plural in caches
            )

        found = await self.looked(actuator, same)
        assert {each.name for each in found.replicas} == set(pods)
        return found

    async def turn(self, actuator: KubernetesActuator, loads: dict[str, Load] | None = None) -> Plan:
        """Look, plan, act, and let the cluster do what it does."""
        self.now += 2.0
        seen = await self.up_to_date(actuator)
        observed = Observed(loads or {}, seen.replicas, seen.gpus)
        plan, self.memory = decide(observed, self.memory, self.groups, SCALING, self.now)
        assert await actuator.lead()
        await actuator.act(plan.starts, plan.drains)
        await self.cluster.steps()
        return plan

    async def close(self) -> None:
        for one in self._actuators:
            with contextlib.suppress(TemporaryError):
                await one.close()


def _caches(actuator: KubernetesActuator) -> list[Any]:
    found = [actuator._nodes, actuator._pods, actuator._templates, actuator._claims, actuator._slices]
    return [cache for cache in found if cache is not None]


@contextlib.asynccontextmanager
async def acting() -> AsyncIterator[Acting]:
    api = FakeApi()
    server = await api.serve()
    tasks = Tasks("test")
    world = Acting(api, str(server.make_url("")).rstrip("/"), tasks)
    try:
        yield world
    finally:
        await world.close()
        await tasks.stop()
        api.break_off()
        await server.close()


def group(name: str = "a", *, memory: float = 70, milli: int = 1000, gpus: int = 1, types: str = "", **more: Any
          ) -> GroupConfig:  # fmt: skip
    shape = {"memory_gib": memory, "milli": milli, "gpus": gpus, "types": types}
    settings = {"name": name, "role": "sampler", "base_model": "org/model", "shape": shape, **more}
    return msgspec.convert(settings, GroupConfig)


def start(of: GroupConfig, gpus: Sequence[str], number: int = 0, replaces: str = "") -> Start:
    return Start(f"{of.name}-{number}", of.name, tuple(gpus), of.shape.shape(), "because", replaces)


def drain(name: str) -> Drain:
    return Drain(name, name.rpartition("-")[0], "because")


async def eventually(look: Callable[[], Awaitable[T | None]], otherwise: str, seconds: float = 20.0) -> T:
    ends = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < ends:
        if (found := await look()) is not None:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(otherwise)
