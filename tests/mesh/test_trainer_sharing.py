"""Runs of several tenants on one trainer: large operations share its passes, and are done once whatever dies."""

from __future__ import annotations

import asyncio

import pytest

from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Int32s
from shared.contracts.training import AnyOperation, Datum, ForwardBackward, LossSpec, OperationResult
from shared.errors import UserError
from tests.mesh.harness import Place, eventually
from tests.mesh.producer import Producer


def data(count: int) -> list[Datum]:
    own = [index % 200 for index in range(count)]
    return [Datum(tokens=Int32s([5, 6, 7, token]), targets=Int32s([6, 7, token, 9])) for token in own]


def large(producer: Producer, count: int) -> AnyOperation:
    return producer.make(ForwardBackward, data=data(count), loss=LossSpec(name="cross_entropy"))


async def trained(producer: Producer, count: int) -> list[float]:
    """Log-probabilities after a large operation and a step."""
    result = await producer.send(large(producer, count))
    assert len(result.logprobs) == count
    await producer.send(producer.step())
    after = await producer.send(producer.train([5, 6, 7], forward_only=True))
    return [result.metrics["loss:sum"], result.metrics["tokens:sum"], *after.logprobs[0]]


async def test_an_operation_in_many_passes_gives_what_it_gives_in_one(place: Place, bus: Bus) -> None:
    results = []
    for budget in (8192, 8):
        producer = Producer(bus, f"run-{budget}")
        async with place.trainer(max_pass_tokens=budget, replica=f"trainer-{budget}"):
            await producer.create()
            results.append(await trained(producer, 12))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


async def test_a_large_operation_does_not_hold_up_a_small_one_of_another_tenant(place: Place, bus: Bus) -> None:
    one, two = Producer(bus, "run-1", owner="ann"), Producer(bus, "run-2", owner="bob")
    answered: list[str] = []

    async def ask(producer: Producer, operation: AnyOperation) -> OperationResult:
        result = await producer.send(operation)
        answered.append(producer.run)
        return result

    async with place.trainer(max_pass_tokens=8) as (service, node):
        await asyncio.gather(one.create(), two.create())
        first = asyncio.create_task(ask(one, large(one, 600)))
        await eventually(lambda: begun(service._runs.held["run-1"]))
        assert 0 < service._held["run-1"].tokens_waiting < 2400
        await ask(two, two.train([5, 6, 7]))
        await first
        measured = node.telemetry.registry.get_sample_value
        assert measured("openrl_trainer_tokens_total", {"tenant": "ann"}) == 2400
        assert measured("openrl_trainer_tokens_total", {"tenant": "bob"}) == 2
        assert (measured("openrl_trainer_passes_total") or 0) >= 300
        assert measured("openrl_trainer_backlog_tokens") == 0
    assert answered == ["run-2", "run-1"]


async def begun(held: object) -> bool | None:
    return True if getattr(held, "data_done", 0) else None


@pytest.mark.parametrize("killed", [False, True])
async def test_an_operation_cut_short_is_done_once_by_the_next_trainer(place: Place, bus: Bus, killed: bool) -> None:
    undisturbed, producer = Producer(bus, "undisturbed"), Producer(bus, "disturbed")
    async with place.trainer(max_pass_tokens=8, replica="trainer-1") as (service, _):
        await undisturbed.create()
        await producer.create()
        expected = await trained(undisturbed, 200)
        asked = asyncio.create_task(trained(producer, 200))
        await eventually(lambda: begun(service._runs.held["disturbed"]))
        service._stopping.set()
        async with service._executing:
            assert service._runs.held["disturbed"].data_done, "between two parts"
            if killed:
                service._runs.held["disturbed"].done_since_snapshot = 0  # nothing is written down at the end
    record = await bus.table(topology.RUNS).get("disturbed")
    assert record is not None
    assert (record.value.snapshot is None) == killed
    async with place.trainer(replica="trainer-2"):
        assert await asked == pytest.approx(expected, rel=1e-4)


async def test_an_operation_cut_short_by_a_lost_lease_is_done_once(place: Place, bus: Bus) -> None:
    undisturbed, producer = Producer(bus, "undisturbed"), Producer(bus, "disturbed")
    async with place.trainer(max_pass_tokens=8) as (service, _):
        await undisturbed.create()
        await producer.create()
        expected = await trained(undisturbed, 200)
        asked = asyncio.create_task(trained(producer, 200))
        first = service._held["disturbed"]
        await eventually(lambda: begun(first))
        await service._runs._let_go("disturbed")  # to be claimed again, by the same trainer
        assert first.data_done, "between two parts"
        assert await asked == pytest.approx(expected, rel=1e-4)
        assert service._held["disturbed"] is not first


async def test_a_large_operation_with_a_bad_datum_at_its_end_fails_alone(place: Place, bus: Bus) -> None:
    async with place.trainer(max_pass_tokens=8):
        producer = Producer(bus, "run-1")
        await producer.create()
        before = await producer.send(producer.train([5, 6, 7], forward_only=True))
        bad = [*data(5), Datum(tokens=Int32s([99999]), targets=Int32s([1]))]
        with pytest.raises(UserError, match="datum 5: tokens\\[0\\] is 99999"):
            await producer.send(producer.make(ForwardBackward, data=bad, loss=LossSpec(name="cross_entropy")))
        await producer.send(producer.step())
        after = await producer.send(producer.train([5, 6, 7], forward_only=True))
        assert before.metrics == after.metrics
