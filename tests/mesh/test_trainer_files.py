"""Saves and loads of a trainer: what they write, what they refuse, and that nobody can tell where one was killed.

The trainer is stopped at each of an operation's writes in turn, another one takes over, and then the first goes on, as
a process does that was only paused. Whoever looks afterwards finds one state, one record, and its blobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pyrage
import pytest
import safetensors.torch
from pyrage import x25519

from services.trainer.service import TrainerService
from shared import topology
from shared.bus import Bus
from shared.checkpoints import Checkpoints, blobs_of
from shared.contracts.base import Failure
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord, SaveSpec
from shared.contracts.policies import LoraSpec, PolicyRef
from shared.contracts.training import (
    CreateRun,
    LoadState,
    OperationResult,
    Refused,
    RunRecord,
    SaveExternal,
    SavePolicy,
    SaveState,
)
from shared.errors import UserError
from tests.mesh.freezing import Freezer
from tests.mesh.harness import MODEL, Place, eventually
from tests.mesh.producer import LORA, Producer

SOURCE = CheckpointKey(run="source", kind="training", name="good")
Act = Callable[[Producer], Coroutine[Any, Any, OperationResult]]


async def source(bus: Bus) -> Producer:
    """A run whose checkpoint `good` others load; it has a gradient that belongs to nobody else."""
    producer = Producer(bus, SOURCE.run)
    await producer.create()
    for _ in range(2):
        await producer.send(producer.train([7, 6, 5]))
        await producer.send(producer.step())
    await producer.send(producer.train([9, 8, 7]))
    await producer.send(producer.make(SaveState, name="good", checkpoint=SaveSpec(name="good")))
    return producer


async def begun(producer: Producer) -> None:
    await producer.create()
    await producer.send(producer.train([5, 6, 7, 8]))
    await producer.send(producer.step())
    await producer.send(producer.train([9, 8, 7]))  # a gradient that no step has used yet


async def went_on(producer: Producer) -> list[float]:
    """What shows weights, optimizer and gathered gradient."""
    await producer.send(producer.step())
    await producer.send(producer.train([5, 6, 7, 8]))
    step = await producer.send(producer.step())
    after = await producer.send(producer.train([5, 6, 7, 8], forward_only=True))
    return [step.metrics["step:max"], *after.logprobs[0]]


async def save_state(producer: Producer) -> OperationResult:
    await begun(producer)
    return await producer.send(producer.make(SaveState, name="a", checkpoint=SaveSpec(name="a")))


async def replace_state(producer: Producer) -> OperationResult:
    await begun(producer)
    await producer.send(producer.make(SaveState, name="a", checkpoint=SaveSpec(name="a")))
    await producer.send(producer.train([1, 2, 3]))
    return await producer.send(producer.make(SaveState, name="a", checkpoint=SaveSpec(name="a", overwrite=True)))


async def save_policy(producer: Producer) -> OperationResult:
    await begun(producer)
    spec = SaveSpec(name="a", ttl_seconds=3600, user_metadata={"note": "good"})
    return await producer.send(producer.make(SavePolicy, version=producer.seq, checkpoint=spec, inflight=True))


async def save_external(producer: Producer) -> OperationResult:
    await begun(producer)
    recipients = [str(x25519.Identity.generate().to_public())]
    return await producer.send(producer.make(SaveExternal, checkpoint=SaveSpec(name="a"), recipients=recipients))


async def load(producer: Producer) -> OperationResult:
    await begun(producer)
    return await producer.send(producer.make(LoadState, source=SOURCE))


async def load_with_optimizer(producer: Producer) -> OperationResult:
    await begun(producer)
    return await producer.send(producer.make(LoadState, source=SOURCE, optimizer=True))


async def create_loaded(producer: Producer) -> OperationResult:
    await producer.record()
    operation = producer.make(CreateRun, base_model=MODEL, lora=LORA, source=SOURCE, optimizer=True)
    return await producer.send(operation)


ACTS = (save_state, replace_state, save_policy, save_external, load, load_with_optimizer, create_loaded)
LAST = {"replace_state": 6}
"""The seq of the operation that is disturbed, where it is neither the first nor that behind `begun`."""


async def check(bus: Bus, act: Act, run: str, result: OperationResult) -> None:
    """What an operation has left is whole, and is what it answered."""
    checkpoints = Checkpoints(bus, bus.blobs)  # type: ignore[arg-type]  # the store of the fixture
    records = await checkpoints.of_run(run)
    if act in (load, load_with_optimizer, create_loaded):
        assert records == []
        return
    assert records == [result.recorded]
    (record,) = records
    assert record.size == sum([len(await bus.blobs.get(ref)) for ref in blobs_of(record)]) > 0
    if act is save_policy:
        assert record.policy == PolicyRef(run=run, version=4)
        assert record.expires == pytest.approx(record.created + 3600)
        entry = await bus.table(topology.INFLIGHT).get(run)
        assert entry is not None
        assert entry.value == record.policy


async def close(bus: Bus, run: str) -> None:
    """Leave the places of trainers to others."""
    runs = bus.table(topology.RUNS)
    entry = await runs.get(run)
    assert entry is not None
    await runs.put(run, msgspec.structs.replace(entry.value, closed=True))


async def take_over(bus: Bus, run: str) -> None:
    """What the time to live of a lease does after ten seconds."""
    await bus.table(topology.LEASES).delete(("run", run))


async def let_go(service: TrainerService, run: str) -> bool | None:
    await service._runs._leases._renew(("run", run))
    return None if run in service._held else True


async def disturbed(place: Place, bus: Bus, act: Act, writes: int) -> tuple[list[float], bool]:
    """Freeze a trainer at a write of `act`'s last operation. What the run gives then, and whether it came to it."""
    name = f"{act.__name__}-{writes}"
    producer = Producer(bus, name)
    last = LAST.get(act.__name__, 0 if act is create_loaded else 4)
    async with place.trainer(replica=f"one-{name}", max_runs=1) as (service, node):
        freezer = Freezer(node)
        send = producer.send

        async def arming(operation: Any) -> OperationResult:
            if operation.seq == last:
                freezer.arm(writes)
            return await send(operation)

        producer.send = arming  # type: ignore[method-assign]
        acting = asyncio.create_task(act(producer))
        freezing = asyncio.create_task(freezer.frozen.wait())
        await asyncio.wait([acting, freezing], return_when=asyncio.FIRST_COMPLETED)
        if acting.done():
            freezing.cancel()
            freezer.thaw()
            await check(bus, act, name, await acting)
            return await went_on(producer), False
        try:
            await take_over(bus, name)
            async with place.trainer(replica=f"two-{name}", max_runs=1):
                result = await acting
                await check(bus, act, name, result)
                freezer.thaw()
                await eventually(lambda: let_go(service, name))
                await check(bus, act, name, result)
                return await went_on(producer), True
        finally:
            freezer.thaw()  # else it could not even be stopped


@pytest.mark.timeout(400)
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
async def test_an_operation_stopped_at_any_write_is_done_once_by_another(place: Place, bus: Bus, act: Act) -> None:
    async with place.trainer(replica="zero"):
        await source(bus)
        producer = Producer(bus, "undisturbed")
        await check(bus, act, "undisturbed", await act(producer))
        wanted = await went_on(producer)
    await close(bus, "source")
    await close(bus, "undisturbed")
    for writes in range(20):
        found, stopped = await disturbed(place, bus, act, writes)
        await close(bus, f"{act.__name__}-{writes}")
        assert found == pytest.approx(wanted, rel=1e-4), f"stopped at write {writes}"
        if not stopped:
            break
    assert 2 <= writes < 20


async def logprobs(producer: Producer) -> list[float]:
    return list((await producer.send(producer.train([7, 6, 5], forward_only=True))).logprobs[0])


async def forgets(service: TrainerService) -> None:
    """The trainer dies without writing anything down that it has not."""

    async def quiet() -> bool | None:
        return None if any(held.aside is not None for held in service._held.values()) else True

    await eventually(quiet)
    for held in service._held.values():
        held.done_since_snapshot = 0


async def test_a_loaded_run_has_the_weights_and_only_if_asked_the_optimizer(place: Place, bus: Bus) -> None:
    async with place.trainer():
        good = await source(bus)
        wanted = await logprobs(good)
        steps = []
        for act in (load, load_with_optimizer, create_loaded):
            producer = Producer(bus, act.__name__)
            await act(producer)
            assert await logprobs(producer) == pytest.approx(wanted, rel=1e-5)
            step = await producer.send(producer.step())
            assert step.metrics["grad_norm:mean"] == 0, "neither the run's gradient nor the checkpoint's is there"
            assert await logprobs(producer) == pytest.approx(wanted, rel=1e-5)
            steps.append(step.metrics["step:max"])
        assert steps == [1, 3, 3]


async def test_what_cannot_be_loaded_is_refused_and_the_run_is_as_it_was(place: Place, bus: Bus) -> None:
    async with place.trainer():
        await source(bus)
        other = Producer(bus, "other-rank")
        record = RunRecord(run=other.run, base_model=MODEL, lora=LoraSpec(rank=8))
        await bus.table(topology.RUNS).create(other.run, record)
        await other.send(other.make(CreateRun, base_model=MODEL, lora=record.lora))
        await other.send(other.make(SavePolicy, version=1, checkpoint=SaveSpec(name="policy")))
        await other.send(other.make(SaveState, name="a", checkpoint=SaveSpec(name="a")))
        foreign = CheckpointRecord(
            key=CheckpointKey(run="foreign", kind="training", name="a"),
            base_model="other/model",
            lora=LORA,
            owner="default",
            seq=1,
            created=0.0,
            size=0,
            state=(await Checkpoints(bus, bus.blobs).of_run(other.run))[1].state,  # type: ignore[arg-type]
        )
        await Checkpoints(bus, bus.blobs).record(foreign, overwrite=False)  # type: ignore[arg-type]
        producer = Producer(bus, "run")
        await begun(producer)
        before = await logprobs(producer)
        for key, complaint in (
            (CheckpointKey(run="nobody", kind="training", name="a"), "no checkpoint tinker://nobody/weights/a"),
            (CheckpointKey(run=other.run, kind="training", name="a"), "rank 8.*rank 16"),
            (CheckpointKey(run=other.run, kind="sampler", name="policy"), "no state to train on"),
            (foreign.key, "other/model"),
        ):
            with pytest.raises(UserError, match=complaint):
                await producer.send(producer.make(LoadState, source=key))
        assert await logprobs(producer) == before
        step = await producer.send(producer.step())
        assert step.metrics["grad_norm:mean"] > 0, "the gradient is still there"
        never = Producer(bus, "never")
        await never.record()
        create = never.make(CreateRun, base_model=MODEL, lora=LORA, source=CheckpointKey(**_key("nobody")))
        with pytest.raises(UserError, match="no checkpoint tinker://nobody"):
            await never.send(create)
        with pytest.raises(UserError, match="never"):
            await never.send(never.train([1, 2, 3]))
        with pytest.raises(UserError, match="was not created"):
            await never.send(never.make(LoadState, source=SOURCE))


def _key(run: str) -> dict[str, Any]:
    return {"run": run, "kind": "training", "name": "good"}


async def test_a_trainer_that_takes_over_needs_the_loaded_checkpoint_no_more(place: Place, bus: Bus) -> None:
    producer = Producer(bus, "run")
    async with place.trainer(replica="one") as (service, node):
        wanted = await logprobs(await source(bus))
        await load(producer)
        await Checkpoints(bus, node.blobs).delete(SOURCE)
        await forgets(service)
    async with place.trainer(replica="two"):
        assert await logprobs(producer) == pytest.approx(wanted, rel=1e-5)


async def test_what_was_answered_is_not_done_again_whatever_has_changed_since(place: Place, bus: Bus) -> None:
    """A load that failed does not succeed in a replay; a checkpoint that was deleted does not come back."""
    producer = Producer(bus, "run")
    key = CheckpointKey(run="run", kind="training", name="a")
    checkpoints = Checkpoints(bus, bus.blobs)  # type: ignore[arg-type]
    async with place.trainer(replica="one") as (service, _):
        await save_state(producer)
        with pytest.raises(UserError, match="no checkpoint"):
            await producer.send(producer.make(LoadState, source=SOURCE))
        before = await logprobs(producer)
        await source(bus)
        assert await checkpoints.delete(key)
        await forgets(service)
    async with place.trainer(replica="two"):
        assert await logprobs(producer) == pytest.approx(before, rel=1e-5)
        assert await checkpoints.find(key) is None


async def test_a_refused_operation_uses_up_its_seq_and_touches_nothing(place: Place, bus: Bus) -> None:
    failure = Failure(message="image chunks cannot be read: the base model knows text only", kind="user")
    producer = Producer(bus, "run")
    async with place.trainer(replica="one"):
        await begun(producer)
        before = await logprobs(producer)
        refused = producer.make(Refused, failure=failure)
        with pytest.raises(UserError, match="image chunks cannot be read"):
            await producer.send(refused)
        assert await logprobs(producer) == before
        again = msgspec.structs.replace(refused, request_id=bus.new_request())
        with pytest.raises(UserError, match="image chunks cannot be read"):
            await bus.ask(topology.OPERATIONS, again, msg_id="again", timeout=30, run="run")
    stillborn = Producer(bus, "stillborn")
    async with place.trainer(replica="two"):
        assert await logprobs(producer) == pytest.approx(before, rel=1e-5)
        await stillborn.record()
        with pytest.raises(UserError, match="image chunks"):
            await stillborn.send(stillborn.make(Refused, failure=failure))
        with pytest.raises(UserError, match="stillborn"):
            await stillborn.send(stillborn.train([1, 2, 3]))


async def test_external_weights_can_be_read_by_their_recipients_alone(
    place: Place, bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, stranger = (x25519.Identity.generate() for _ in range(3))
    async with place.trainer():
        producer = Producer(bus, "run")
        await begun(producer)
        plain = (await producer.send(producer.make(SaveExternal, checkpoint=SaveSpec(name="plain")))).recorded
        assert plain is not None
        assert (plain.key.kind, plain.encrypted) == ("external", False)
        keys = [str(each.to_public()) for each in (one, two)]
        sent = producer.make(SaveExternal, checkpoint=SaveSpec(name="secret"), recipients=keys)
        secret = (await producer.send(sent)).recorded
        assert secret is not None
        assert secret.encrypted
        assert set(secret.files) == {"adapter_config.json.age", "adapter_model.safetensors.age"}
        for name, ref in plain.files.items():
            content = await bus.blobs.get(ref)
            hidden = await bus.blobs.get(secret.files[f"{name}.age"])
            assert pyrage.decrypt(hidden, [one]) == pyrage.decrypt(hidden, [two]) == content
            with pytest.raises(pyrage.DecryptError):
                pyrage.decrypt(hidden, [stranger])
        weights = safetensors.torch.load(await bus.blobs.get(plain.files["adapter_model.safetensors"]))
        assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
        for bad, complaint in (
            (["age1nonsense"], "recipient 1 is no public key"),
            ([keys[0], ""], "recipient 2 is no public key"),
            ([str(stranger)], "recipient 1 is a secret key"),
            (keys * 6, "12 recipients were given: encrypt for 10 at most"),
        ):
            sent = producer.make(SaveExternal, checkpoint=SaveSpec(name="never"), recipients=bad)
            with pytest.raises(UserError, match=complaint) as caught:
                await producer.send(sent)
            assert str(stranger) not in str(caught.value) + caplog.text
        with pytest.raises(UserError, match="tinker://run/external_weights/plain exists already"):
            await producer.send(producer.make(SaveExternal, checkpoint=SaveSpec(name="plain")))


async def test_files_of_one_run_do_not_hold_up_another(place: Place, bus: Bus) -> None:
    async with place.trainer(snapshot_operations=1000) as (service, node):
        await source(bus)
        slow, fast = Producer(bus, "slow"), Producer(bus, "fast")
        await begun(slow)
        await begun(fast)
        gate, put = asyncio.Event(), node.blobs.put

        async def slowly(key: str, content: bytes, *, sha256: str | None = None) -> Any:
            if "slow" in key:
                await gate.wait()
            return await put(key, content, sha256=sha256)

        node.blobs.put = slowly  # type: ignore[method-assign]
        operations = [
            slow.make(SaveState, name="a", checkpoint=SaveSpec(name="a")),
            slow.make(SavePolicy, version=5),
            slow.make(LoadState, source=SOURCE),
        ]
        saving = asyncio.gather(*(slow.send(operation) for operation in operations))
        await eventually(lambda: _is_aside(service, "slow"))
        await went_on(fast)
        assert not saving.done()
        gate.set()
        results = await saving
        assert results[0].recorded is not None


async def _is_aside(service: TrainerService, run: str) -> bool | None:
    return True if service._held[run].aside is not None else None


async def test_in_flight_goes_forward_only(place: Place, bus: Bus) -> None:
    table = bus.table(topology.INFLIGHT)
    async with place.trainer():
        producer = Producer(bus, "run")
        await begun(producer)
        for version, wanted in ((4, 4), (9, 9), (6, 9)):
            await producer.send(producer.make(SavePolicy, version=version, inflight=True))
            entry = await table.get("run")
            assert entry is not None
            assert entry.value == PolicyRef(run="run", version=wanted)
        await producer.send(producer.make(SavePolicy, version=10))
        entry = await table.get("run")
        assert entry is not None
        assert entry.value.version == 9
