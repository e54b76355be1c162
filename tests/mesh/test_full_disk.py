"""A full disk holds work up, says so, and loses nothing: when there is room again, the work goes on by itself."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.local.nats_server import NatsServer
from shared import topology
from shared.blobs import BlobStore
from shared.bus import Bus
from shared.contracts.jobs import JobChanged
from shared.errors import StorageFull, TemporaryError
from tests.mesh.harness import Place, eventually
from tests.mesh.test_jobs import ended, job, mesh, submit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount one: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path, *, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    filler = path / "filler"
    free = int(subprocess.check_output(["df", "--output=avail", "-B1", str(path)]).split()[1])
    filler.write_bytes(b"x" * (free - leave))
    return filler


async def test_a_blob_that_does_not_fit_is_refused_with_the_reason(small_disk: Path) -> None:
    store = BlobStore(str(small_disk))
    with pytest.raises(StorageFull, match="no space left"):
        await store.put("a.bin", b"x" * (2 << 20))
    assert await store.get(await store.put("b.bin", b"fits")) == b"fits"


async def test_a_job_waits_for_room_and_goes_on(
    nats_server: NatsServer, tmp_path: Path, tiny_model: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(nats_server.url, tmp_path, tiny_model)
    place.common["blob_url"] = str(small_disk / "blobs")
    async with mesh(place):
        bus = await Bus.connect(nats_server.url, BlobStore(str(small_disk / "blobs")), name="test")
        filler = fill(small_disk, leave=8192)
        # Without a budget every answer costs, so that rewards differ and there is something to save.
        spec = job(reward={"name": "length_penalty", "params": {"budget": 0, "per_token": 0.1}})
        answer = await submit(bus, spec)
        assert answer.job is not None

        async def held_up() -> bool | None:
            return True if "no space left" in caplog.text else None

        await eventually(held_up, 60)
        entry = await bus.table(topology.JOB_RECORDS).get(answer.job)
        assert entry is not None
        assert entry.value.phase == "running", "a full disk does not end a job"
        filler.unlink()
        record = await ended(bus, answer.job)
        assert (record.phase, record.step) == ("succeeded", 3)
        await bus.close()


async def test_a_bus_without_room_is_an_error_that_names_the_disk(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await NatsServer.start(small_disk / "nats", max_store_bytes=topology.MOST_BYTES * 2)
    bus = await Bus.connect(server.url, BlobStore(str(tmp_path / "blobs")), name="test")
    monkeypatch.setattr("shared.bus.PUBLISH_PATIENCE", 1.0)
    event = JobChanged(job="x", phase="queued", reason="y" * 100_000)

    async def publish_a_lot() -> None:
        for _ in range(20):
            await bus.publish(topology.JOB_PHASES, event, job="x")

    with pytest.raises(TemporaryError, match="disk"):
        await publish_a_lot()
    await bus.close()
    await asyncio.wait_for(server.stop(), 30)
