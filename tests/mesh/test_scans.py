"""Stretches of streams, read many messages at a time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from services.gateway.mirrors import Mirror
from services.local.nats_server import NatsServer
from shared import scans, topology
from shared.bus import Bus
from shared.contracts.sessions import RunActivity
from shared.contracts.tenants import Audited
from shared.tasks import Tasks


async def fill(bus: Bus, count: int, prefix: str = "run") -> None:
    table = bus.table(topology.ACTIVITY)
    await asyncio.gather(*(table.put(f"{prefix}-{number}", RunActivity(at=number)) for number in range(count)))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
async def test_all_entries_are_read_whatever_fits_into_a_batch(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(scans, "BATCH", 8)
    await fill(bus, count)
    entries = await bus.table(topology.ACTIVITY).items()
    assert sorted(entry.value.at for entry in entries) == list(range(count))
    assert [entry.revision for entry in entries] == list(range(1, count + 1))


async def test_a_batch_is_bounded_in_bytes(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "BATCH_BYTES", 300)
    await fill(bus, 30)
    assert len(await bus.table(topology.ACTIVITY).items()) == 30


async def test_deleted_entries_are_left_out_and_the_revision_counts_them(bus: Bus) -> None:
    table = bus.table(topology.ACTIVITY)
    assert await table.revision() == 0
    await fill(bus, 3)
    await table.delete("run-2")
    assert {entry.key for entry in await table.items()} == {("run-0",), ("run-1",)}
    assert await table.revision() == 4


async def test_a_scan_begins_at_a_time_and_at_one_owner(bus: Bus) -> None:
    for number in range(3):
        entry = Audited(at=number, owner="me", event="x_done")
        await bus.publish(topology.AUDITS, entry, owner="me")
    await asyncio.sleep(0.05)
    middle = time.time()
    await asyncio.sleep(0.05)
    for owner in ("me", "you"):
        await bus.publish(topology.AUDITS, Audited(at=9, owner=owner, event="x_done"), owner=owner)
    later = [each async for each in bus.scan(topology.AUDITS, since=middle)]
    assert [(each.message.owner, each.message.at) for each in later] == [("me", 9), ("you", 9)]
    assert all(each.time > middle for each in later)
    mine = [each.message.at async for each in bus.scan(topology.AUDITS, owner="me")]
    assert mine == [0, 1, 2, 9]
    assert [each async for each in bus.scan(topology.AUDITS, since=time.time() + 60)] == []


async def test_what_cannot_be_read_is_passed_over(bus: Bus) -> None:
    await bus.stream_context.publish(topology.AUDITS.subject(owner="me"), b"no json")
    await bus.publish(topology.AUDITS, Audited(at=1, owner="me", event="x_done"), owner="me")
    assert [each.message.at async for each in bus.scan(topology.AUDITS)] == [1]


async def test_a_mirror_is_as_new_as_the_bucket_when_it_is_asked_to_be(bus: Bus) -> None:
    tasks = Tasks("test")
    table = bus.table(topology.ACTIVITY)
    mirror = Mirror(table)
    await fill(bus, 20)
    await mirror.start(tasks, "activity")
    assert len(mirror.values) == 20
    for number in range(100):
        await table.put("same", RunActivity(at=number))
        assert (await mirror.fresh())[("same",)].at == number
    # One that cannot be decoded holds nothing up.
    await bus.stream_context.publish("$KV.activity.bad", b"no json")
    await table.delete("same")
    assert ("same",) not in await mirror.fresh()
    await tasks.stop()


async def test_a_scan_survives_a_server_that_is_away_for_a_while(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    await fill(bus, 5)
    port = nats_server.port
    await nats_server.stop()
    scanning = asyncio.create_task(bus.table(topology.ACTIVITY).items())
    await asyncio.sleep(0.5)
    again = await NatsServer.start(tmp_path / "nats", port=port)
    try:
        assert len(await scanning) == 5
    finally:
        await again.stop()
