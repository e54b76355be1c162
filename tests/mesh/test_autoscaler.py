"""The autoscaler on a machine with a supervisor: from metrics to processes that start and end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from services.autoscaler.config import AutoscalerConfig, GroupConfig, ScalingConfig, ShapeConfig
from services.autoscaler.readings import BUS_LOOK, SAMPLERS
from services.autoscaler.service import AutoscalerService
from services.local.config import ServiceCommand
from services.local.placed import Placeable, Placed
from services.local.state import Condition
from shared import topology
from shared.contracts.placement import NEWEST_PLAN, GpuRecord, NodeRecord, PlacementRecord, ScalingDecided
from shared.contracts.replicas import ReplicaRecord
from shared.node import Node
from shared.process import running
from tests.mesh.harness import Place, eventually

MODEL = "org/model"
NODE = NodeRecord(node="here", gpus=[GpuRecord(name="here/0", index="0", memory_gib=80.0, type="H100")])
GROUP = GroupConfig(
    name="samplers", role="sampler", base_model=MODEL, shape=ShapeConfig(memory_gib=8.0, milli=250), slots=4, max=3
)
PLACEABLE = Placeable({MODEL: Path("/models/one")})
SCALING = ScalingConfig(tick_seconds=0.05)


class FakePrometheus:
    """Answers the one query with what a test sets; None: with an error."""

    def __init__(self) -> None:
        self.values: dict[str, float] | None = {}
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        if self.values is None:
            return web.Response(status=503)
        values = {BUS_LOOK: 0.0, **self.values}
        result = [
            {
                "metric": {"__name__": name, "base_model": "" if name == BUS_LOOK else MODEL},
                "values": [[time.time(), str(value)]],
            }
            for name, value in values.items()
        ]
        return web.json_response({"status": "success", "data": {"resultType": "matrix", "result": result}})


@pytest.fixture
async def prometheus() -> AsyncIterator[FakePrometheus]:
    fake = FakePrometheus()
    app = web.Application()
    app.router.add_get("/api/v1/query", fake.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


class FakeChild:
    """A process that ends when it is told to."""

    def __init__(self, command: ServiceCommand) -> None:
        self.command = command
        self.name = command.name
        self.condition: Condition = "starting"

    def stop(self) -> None:
        self.condition = "stopped"


class Machine:
    """A supervisor's part in it, with processes that are not really there."""

    def __init__(self, node: Node) -> None:
        self.children: list[FakeChild] = []
        self.bus = node.bus
        self.placed = Placed(node.bus, NODE, PLACEABLE, self._start, self.children.remove)  # type: ignore[arg-type]

    def _start(self, command: ServiceCommand) -> Any:
        self.children.append(FakeChild(command))
        return self.children[-1]

    async def becomes_ready(self, name: str) -> None:
        record = ReplicaRecord(
            replica=name, service="sampler", pid=1, host="127.0.0.1", metrics_port=1, ready=True, base_model=MODEL
        )
        await self.bus.table(topology.REPLICAS).put(name, record)


@contextlib.asynccontextmanager
async def autoscaler(
    place: Place, prometheus: FakePrometheus, name: str = "autoscaler-1", **settings: Any
) -> AsyncIterator[tuple[AutoscalerService, Node]]:
    config = AutoscalerConfig(
        **{
            **place.common,
            "replica": name,
            "groups": [GROUP],
            "scaling": SCALING,
            "prometheus_url": prometheus.url,
            **settings,
        }
    )
    async with running("autoscaler", config, AutoscalerService) as (service, node):
        assert isinstance(service, AutoscalerService)
        yield service, node


async def test_the_first_request_starts_a_replica_where_there_is_room(place: Place, prometheus: FakePrometheus) -> None:
    async with autoscaler(place, prometheus) as (_, node):
        machine = Machine(node)
        node.tasks.start("placed", machine.placed.keep())
        prometheus.values = {SAMPLERS["queued"]: 1.0}

        async def started() -> FakeChild | None:
            return machine.children[0] if machine.children else None

        child = await eventually(started)
    assert child.command.service == "sampler"
    assert child.command.config["base_model"] == MODEL
    assert child.command.config["model_dir"] == "/models/one"
    assert child.command.environment == {"CUDA_VISIBLE_DEVICES": "0"}


async def test_a_replica_that_is_drained_ends_and_its_entry_goes(place: Place, prometheus: FakePrometheus) -> None:
    async with autoscaler(place, prometheus, dry_run=True) as (_, node):
        machine = Machine(node)
        placements = node.bus.table(topology.PLACEMENTS)
        record = PlacementRecord(
            replica="samplers-0", group="samplers", role="sampler", base_model=MODEL, gpus=["here/0"],
            memory_gib=8.0, milli=250, since=0.0,
        )  # fmt: skip
        await placements.put("samplers-0", record)
        await machine.placed.look()
        assert [child.name for child in machine.children] == ["samplers-0"]
        await placements.put("samplers-0", msgspec.structs.replace(record, draining=True))
        await machine.placed.look()
        await machine.placed.look()
        assert machine.children == []
        assert await placements.get("samplers-0") is None


async def test_every_decision_is_told_with_its_reason_and_the_plan_can_be_read(
    place: Place, prometheus: FakePrometheus
) -> None:
    async with autoscaler(place, prometheus) as (_, node):
        machine = Machine(node)
        node.tasks.start("placed", machine.placed.keep())
        prometheus.values = {SAMPLERS["queued"]: 1.0, SAMPLERS["oldest"]: 3.0}
        told: list[ScalingDecided] = []
        async for delivery in node.bus.follow(topology.SCALING):
            told.append(delivery.message)
            if delivery.message.decision == "start":
                break
        plan = await node.bus.table(topology.PLANS).get(NEWEST_PLAN)
    assert [event.decision for event in told[-2:]] == ["scale", "start"]
    assert "the first request waits" in told[-2].reason
    assert told[-1].gpus == ["here/0"]
    assert plan is not None
    assert plan.value.groups[0].load["queued"] == 1.0


async def test_without_prometheus_nothing_is_stopped(place: Place, prometheus: FakePrometheus) -> None:
    patient_only_a_moment = msgspec.structs.replace(SCALING, down_seconds=0.01, stable_seconds=0.1, panic_seconds=0.05)
    idle_only_a_moment = msgspec.structs.replace(GROUP, idle_seconds=0.05)
    settings: dict[str, Any] = {"scaling": patient_only_a_moment, "groups": [idle_only_a_moment]}
    async with autoscaler(place, prometheus, **settings) as (service, node):
        machine = Machine(node)
        node.tasks.start("placed", machine.placed.keep())
        prometheus.values = {SAMPLERS["queued"]: 1.0}

        async def started() -> bool | None:
            return True if machine.children else None

        await eventually(started)
        await machine.becomes_ready("samplers-0")
        prometheus.values = None

        async def held() -> bool | None:
            plan = await node.bus.table(topology.PLANS).get(NEWEST_PLAN)
            return True if plan is not None and "held" in plan.value.groups[0].reason else None

        await eventually(held)
        for _ in range(20):
            plan = await service.tick()
            assert plan is not None
            assert not plan.drains
        assert len(machine.children) == 1


async def test_a_dry_run_says_what_it_would_do_and_does_nothing(place: Place, prometheus: FakePrometheus) -> None:
    prometheus.values = {SAMPLERS["queued"]: 1.0}
    async with autoscaler(place, prometheus, dry_run=True) as (_, node):
        await node.bus.table(topology.NODES).put("here", NODE)

        async def planned() -> bool | None:
            plan = await node.bus.table(topology.PLANS).get(NEWEST_PLAN)
            starts = [replica for replica in plan.value.replicas if replica.state == "start"] if plan else []
            return True if plan is not None and plan.value.dry_run and starts else None

        await eventually(planned)
        assert await node.bus.table(topology.PLACEMENTS).items() == []


async def test_of_two_autoscalers_one_plans(place: Place, prometheus: FakePrometheus) -> None:
    async with autoscaler(place, prometheus) as (first, _):

        async def leads() -> bool | None:
            return True if await first.tick() is not None else None

        await eventually(leads)
        async with autoscaler(place, prometheus, name="autoscaler-2") as (second, _):
            assert await second.tick() is None
            assert second.activity() == "another one leads"
