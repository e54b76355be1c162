"""A trainer holds more runs than its device has places for: they come and go, and no result shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from services.trainer import service as service_module
from services.trainer.engines import run_state, torch_engine
from services.trainer.engines.adamw import adamw
from services.trainer.engines.keeper import Keeper
from services.trainer.engines.torch_engine import TorchTrainerEngine
from services.trainer.residency import Level
from services.trainer.service import TrainerService
from shared.bus import Bus
from shared.errors import UserError
from tests.mesh.harness import Place, eventually
from tests.mesh.producer import Producer

RUNS = 6
CRAMPED = {"max_resident_runs": 2, "max_host_runs": 2, "park_seconds": 1000.0}


def producers(bus: Bus, name: str) -> list[Producer]:
    return [Producer(bus, f"{name}-{index}", owner=f"owner-{index % 2}") for index in range(RUNS)]


async def train(producer: Producer, rounds: int) -> list[float]:
    """What a run gives after training on tokens of its own."""
    own = int(producer.run.rpartition("-")[2])
    for _ in range(rounds):
        await producer.send(producer.train([5, 6, 7 + own, 8]))
        await producer.send(producer.step())
    await producer.send(producer.train([9, 8, 7 + own]))  # a gradient that no step has used yet
    result = await producer.send(producer.train([5, 6, 7 + own, 8], forward_only=True))
    return [result.metrics["loss:sum"], *result.logprobs[0]]


async def train_all(runs: list[Producer], rounds: int) -> list[list[float]]:
    return await asyncio.gather(*(train(producer, rounds) for producer in runs))


def levels(service: TrainerService, name: str) -> list[Level]:
    return [held.level for run, held in service._held.items() if run.startswith(name)]


def same(ours: list[list[float]], theirs: list[list[float]]) -> bool:
    return all(one == pytest.approx(other, rel=1e-4) for one, other in zip(ours, theirs, strict=True))


async def expected(place: Place, bus: Bus, rounds: int) -> list[list[float]]:
    """The same training where there is room for all."""
    async with place.trainer(replica="roomy"):
        runs = producers(bus, "roomy")
        await asyncio.gather(*(producer.create() for producer in runs))
        await train_all(runs, rounds)
        return await train_all(runs, rounds)


async def test_more_runs_than_places_get_what_they_would_get_alone(place: Place, bus: Bus) -> None:
    wanted = await expected(place, bus, 2)
    runs = producers(bus, "cramped")
    async with place.trainer(**CRAMPED) as (service, node):
        await asyncio.gather(*(producer.create() for producer in runs))
        await train_all(runs, 2)
        there = levels(service, "cramped")
        counted = [
            node.telemetry.registry.get_sample_value(f"openrl_trainer_{name}_runs")
            for name in ("resident", "parked", "evicted")
        ]
        assert counted[0] == there.count(Level.DEVICE)
        assert sum(count or 0 for count in counted) == len(service._held)
        assert there.count(Level.DEVICE) <= 2
        assert there.count(Level.HOST) <= 2
        assert there.count(Level.STORE) >= 2
        assert same(await train_all(runs, 2), wanted)
        assert service._metrics.loads.labels("store")._value.get() > 0


async def test_a_trainer_killed_with_runs_in_every_place_is_replaced(place: Place, bus: Bus) -> None:
    wanted = await expected(place, bus, 2)
    runs = producers(bus, "cramped")
    async with place.trainer(**CRAMPED, replica="trainer-1") as (service, _):
        await asyncio.gather(*(producer.create() for producer in runs))
        await train_all(runs, 2)

        async def everywhere() -> bool | None:
            return set(levels(service, "cramped")) == {Level.DEVICE, Level.HOST, Level.STORE} or None

        await eventually(everywhere)  # a run on its way is in none of them for a moment
        for held in service._held.values():
            held.done_since_snapshot = 0  # it dies without writing anything down
    async with place.trainer(**CRAMPED, replica="trainer-2") as (service, _):
        assert same(await train_all(runs, 2), wanted)


async def test_an_idle_run_leaves_and_comes_back(place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = await expected(place, bus, 1)
    monkeypatch.setattr(service_module, "TIDY_SECONDS", 0.05)
    producer = producers(bus, "idle")[3]
    async with place.trainer(park_seconds=0.1, evict_seconds=0.3) as (service, _):
        await producer.create()
        await train(producer, 1)
        for level in (Level.HOST, Level.STORE):

            async def reached(level: Level = level) -> bool | None:
                return levels(service, "idle") == [level] or None

            await eventually(reached)
        assert not service._engine.engine.runs
        assert same([await train(producer, 1)], [wanted[3]])


async def test_memory_that_runs_out_in_a_pass_or_a_step_is_made_too(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = await expected(place, bus, 1)
    runs = producers(bus, "cramped")
    failed: list[str] = []
    async with place.trainer(max_pass_tokens=4) as (service, _):
        engine = service._engine.engine
        assert isinstance(engine, TorchTrainerEngine)
        keeper = engine._keeper

        def cramped(where: str, function: Callable[..., object]) -> Callable[..., object]:
            def instead(*arguments: object) -> object:
                if len(keeper.states) - len(keeper.parked) > 1:
                    failed.append(where)
                    raise torch.OutOfMemoryError("no room")
                return function(*arguments)

            return instead

        await asyncio.gather(*(producer.create() for producer in runs))
        monkeypatch.setattr(run_state, "adamw", cramped("step", adamw))
        monkeypatch.setattr(torch_engine, "_joined", cramped("pass", torch_engine._joined))
        await train_all(runs, 1)
        assert same(await train_all(runs, 1), wanted)
    assert set(failed) == {"step", "pass"}


async def test_memory_that_runs_out_is_made_by_parking_others(
    place: Place, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = await expected(place, bus, 1)
    room = 2

    def hold(keeper: Keeper, *arguments: object) -> None:
        crowd(keeper)
        held(keeper, *arguments)  # type: ignore[arg-type]

    def crowd(keeper: Keeper) -> None:
        if len(keeper.states) - len(keeper.parked) >= room:
            raise keeper.no_room("one more")

    def to_device(keeper: Keeper, tensor: torch.Tensor) -> torch.Tensor:
        if len(keeper.states) - len(keeper.parked) >= room:
            raise torch.OutOfMemoryError("no room")
        return tensor.clone()

    held = Keeper.hold
    monkeypatch.setattr(Keeper, "hold", hold)
    monkeypatch.setattr(Keeper, "_to_device", to_device)
    runs = producers(bus, "cramped")
    async with place.trainer() as (service, _):
        await asyncio.gather(*(producer.create() for producer in runs))
        await train_all(runs, 1)
        assert levels(service, "cramped").count(Level.DEVICE) == 2
        assert same(await train_all(runs, 1), wanted)
        room = 0
        with pytest.raises(UserError, match="no memory is left"):
            await Producer(bus, "too-much").create()
