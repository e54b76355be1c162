"""The janitor on the real bus: sessions that have ended leave nothing behind, and nobody else loses anything."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from services.coordinator.service import CoordinatorService
from shared import topology
from shared.bus import Bus
from shared.checkpoints import Checkpoints, path_of
from shared.contracts.checkpoints import CheckpointKey, SaveSpec
from shared.contracts.sessions import Heartbeat, SamplerRecord, SessionRecord
from shared.contracts.training import RunRecord, SavePolicy, SaveState
from tests.mesh.harness import MODEL, Place, eventually
from tests.mesh.producer import LORA, Producer

QUICK = {
    "janitor_seconds": 0.05,
    "silence_seconds": 0.1,
    "session_grace_seconds": 0.2,
    "unnamed_policy_seconds": 0.2,
}


class Client(Producer):
    """A client's program, as far as the bus sees it."""

    def __init__(self, bus: Bus, session: str) -> None:
        super().__init__(bus, f"{session}:train:0")
        self.session = session

    async def begin(self, **fields: Any) -> None:
        record = SessionRecord(session=self.session, owner=self.owner, created=time.time() - 10_000, **fields)
        await self.bus.table(topology.SESSIONS).create(self.session, record)
        await self.bus.table(topology.HEARTBEATS).put(self.session, Heartbeat(at=time.time()))

    async def record(self) -> None:
        record = RunRecord(run=self.run, base_model=MODEL, lora=LORA, owner=self.owner, session=self.session)
        await self.bus.table(topology.RUNS).create(self.run, record)

    async def save(self, **fields: Any) -> int:
        """Save a policy with a sampler of its own, and return its version."""
        version = self.seq
        saved = await self.send(self.make(SavePolicy, version=version, **fields))
        assert saved.policy is not None
        sampler = f"{self.session}:sample:{version}"
        record = SamplerRecord(
            sampler=sampler,
            session=self.session,
            owner=self.owner,
            base_model=MODEL,
            policy=saved.policy.policy,
        )
        await self.bus.table(topology.SAMPLERS).create(sampler, record)
        return version

    async def end(self) -> None:
        sessions = self.bus.table(topology.SESSIONS)
        entry = await sessions.get(self.session)
        assert entry is not None
        await sessions.put(self.session, msgspec.structs.replace(entry.value, ended="success", ended_at=time.time()))

    async def versions(self) -> list[int]:
        return [entry.value.policy.version for entry in await self.bus.table(topology.POLICIES).items(self.run)]


async def looked_twice(service: CoordinatorService) -> None:
    """The janitor has looked, and again, at what is there now."""
    janitor = service._janitor
    for _ in range(2):
        seen = janitor._since

        async def looked(seen: object = seen) -> bool | None:
            return True if janitor._since is not seen else None

        await eventually(looked)


async def test_a_session_that_lapses_leaves_only_what_has_a_name(place: Place, bus: Bus) -> None:
    gone, there, job = Client(bus, "s-gone"), Client(bus, "s-there"), Producer(bus, "job-run")
    runs, sessions = bus.table(topology.RUNS), bus.table(topology.SESSIONS)
    async with place.trainer(snapshot_operations=2):
        for client in (gone, there):
            await client.begin()
        for producer in (gone, there, job):
            await producer.create()
            await producer.send(producer.train([5, 6, 7]))
            await producer.send(producer.step())
        for client in (gone, there):
            assert await client.save() == 3
            assert await client.save(inflight=True) == 4
            assert await client.save(checkpoint=SaveSpec(name="kept")) == 5
            await client.send(client.make(SaveState, name="kept", checkpoint=SaveSpec(name="kept")))
        await job.send(job.make(SavePolicy, version=3))
        async with place.coordinator(**QUICK) as (service, _):
            await looked_twice(service)
            await bus.table(topology.HEARTBEATS).delete("s-gone")

            async def put_away() -> bool | None:
                return True if await gone.versions() == [5] else None

            await eventually(put_away)
            await looked_twice(service)
            session = await sessions.get("s-gone")
            assert session is not None
            assert session.value.ended == "lapsed"
            run = await runs.get(gone.run)
            assert run is not None
            assert (run.value.closed, run.value.snapshot) == (True, None)
            assert await bus.last_place(topology.OPERATIONS, run=gone.run) == 0
            samplers = [entry.value.session for entry in await bus.table(topology.SAMPLERS).items()]
            assert samplers == ["s-there"] * 3
            assert [entry.key[0] for entry in await bus.table(topology.INFLIGHT).items()] == [there.run]
            await other_things_are_as_they_were(bus, there, job)
    await only_named_blobs_are_left(place, bus, gone)


async def other_things_are_as_they_were(bus: Bus, there: Client, job: Producer) -> None:
    session = await bus.table(topology.SESSIONS).get("s-there")
    assert session is not None
    assert session.value.ended is None
    assert await there.versions() == [3, 4, 5]
    assert await bus.table(topology.POLICIES).get((job.run, "3")) is not None
    for producer in (there, job):
        await producer.send(producer.train([5, 6, 7]))


async def only_named_blobs_are_left(place: Place, bus: Bus, gone: Client) -> None:
    folder = topology.token(gone.run)
    left = {path.name for path in (place.directory / "blobs").rglob("*") if folder in str(path) and path.is_file()}
    records = await Checkpoints(bus, bus.blobs).of_run(gone.run)  # type: ignore[arg-type]
    assert {record.key.kind for record in records} == {"sampler", "training"}
    named = [ref for record in records for ref in (record.state, *record.files.values()) if ref is not None]
    assert left == {ref.key.rpartition("/")[2] for ref in named}
    for ref in named:
        await bus.blobs.get(ref)


async def test_older_policies_of_a_session_that_goes_on_leave_when_nothing_names_them(place: Place, bus: Bus) -> None:
    client = Client(bus, "s-1")
    async with place.trainer(snapshot_operations=2) as _, place.coordinator(**QUICK) as (service, _):
        await client.begin()
        await client.create()
        for _ in range(3):
            await client.send(client.make(SavePolicy, version=client.seq, inflight=True))
        named = await client.save()
        await client.send(client.train([5, 6, 7]))
        await client.send(client.step())

        async def left() -> bool | None:
            return True if await client.versions() == [3, named] else None

        await eventually(left)
        await looked_twice(service)
        assert await client.versions() == [3, named]


async def test_checkpoints_expire_and_a_changed_mind_counts(place: Place, bus: Bus) -> None:
    client = Client(bus, "s-1")
    checkpoints = Checkpoints(bus, bus.blobs)  # type: ignore[arg-type]
    async with place.trainer():
        await client.begin()
        await client.create()
        for name in ("short", "longer"):
            spec = SaveSpec(name=name, ttl_seconds=3600)
            await client.send(client.make(SaveState, name=name, checkpoint=spec))
    keys = {name: CheckpointKey(run=client.run, kind="training", name=name) for name in ("short", "longer")}
    past = time.time() - 1
    short = await checkpoints.change(keys["short"], expires=past)
    assert short is not None
    async with place.coordinator(**QUICK) as (service, _):

        async def expired() -> bool | None:
            return True if await checkpoints.find(keys["short"]) is None else None

        await eventually(expired)
        await looked_twice(service)
    assert short.state is not None
    assert not (place.directory / "blobs" / short.state.key).exists()
    assert await checkpoints.find(keys["longer"]) is not None
    told = [delivery.message async for delivery in bus.scan(topology.AUDITS)]
    assert [(entry.event, entry.details["tinker_path"]) for entry in told] == [
        ("checkpoint_expired", path_of(keys["short"]))
    ]
    assert told[0].details["size"] == short.size > 0


async def test_one_of_two_coordinators_looks_and_the_other_takes_over(place: Place, bus: Bus) -> None:
    client = Client(bus, "s-1")
    await client.begin()
    async with place.coordinator(**QUICK, replica="one") as (one, _):
        await looked_twice(one)
        async with place.coordinator(**QUICK, replica="two") as (two, _):
            lease = await bus.table(topology.LEASES).get(("janitor", "janitor"))
            assert lease is not None
            assert lease.value.holder == "one"
            await one._janitor.stop()
            one._janitor._leases.claim = _never  # type: ignore[method-assign, assignment]
            await bus.table(topology.HEARTBEATS).delete("s-1")

            async def lapsed() -> bool | None:
                entry = await bus.table(topology.SESSIONS).get("s-1")
                return True if entry is not None and entry.value.ended == "lapsed" else None

            await eventually(lapsed)
            assert two._janitor._since is not None


async def _never(_: object) -> bool:
    return False


@pytest.mark.parametrize("ended", ["success", "errored"])
async def test_a_client_that_said_how_it_ended_is_not_overruled(place: Place, bus: Bus, ended: str) -> None:
    client = Client(bus, "s-1")
    await client.begin(ended=ended, ended_at=1.0)
    await bus.table(topology.HEARTBEATS).delete("s-1")
    async with place.coordinator(**QUICK) as (service, _):
        await looked_twice(service)
    entry = await bus.table(topology.SESSIONS).get("s-1")
    assert entry is not None
    assert entry.value.ended == ended
