"""The bus on a cluster of three servers: every stream on all of them, and the leader killed while work goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from services.local.nats_server import NatsServer
from shared import provision, topology
from shared.blobs import BlobStore
from shared.bus import Bus, Delivery, Login
from shared.contracts.arrays import Int32s
from shared.contracts.jobs import JobChanged
from shared.contracts.sampling import SampleRequest, SampleResult
from shared.contracts.training import Lease
from shared.errors import UserError
from tests.mesh.cluster import LOGIN, Cluster, running_cluster
from tests.mesh.test_bus import sampling_worker

pytestmark = pytest.mark.timeout(240)
STREAMS = [stream.name for stream in topology.STREAMS] + [f"KV_{bucket.name}" for bucket in topology.BUCKETS]
MESSAGES = 300


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tmp_path / "nats") as servers:
        yield servers


@contextlib.asynccontextmanager
async def connected(url: str, tmp_path: Path, *, replicas: int = 3, login: Login = LOGIN) -> AsyncIterator[Bus]:
    blobs = BlobStore(str(tmp_path / "blobs"))
    async with asyncio.timeout(60):
        bus = await Bus.connect(url, blobs, name="test", replicas=replicas, login=login)
    yield bus
    await bus.close()


async def leader_of(bus: Bus, stream: str) -> str:
    info = (await bus.stream_context.stream_info(stream)).cluster
    assert info is not None
    assert info.leader
    return info.leader


async def copies(bus: Bus) -> dict[str, int | None]:
    return {name: (await bus.stream_context.stream_info(name)).config.num_replicas for name in STREAMS}


async def test_all_servers_keep_every_stream_and_bucket_and_fewer_are_not_asked_for_later(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with connected(cluster.url, tmp_path) as bus:
        assert await copies(bus) == dict.fromkeys(STREAMS, 3)
    async with connected(cluster.url, tmp_path, replicas=1) as bus:  # a command that knows nothing of clusters
        assert await copies(bus) == dict.fromkeys(STREAMS, 3)
        assert not bus.consistent


async def test_streams_of_one_server_grow_with_their_content(cluster: Cluster, tmp_path: Path) -> None:
    async with connected(cluster.url, tmp_path, replicas=1) as bus:
        await bus.publish(topology.JOB_PHASES, JobChanged(job="before", phase="queued"), job="before")
    async with connected(cluster.url, tmp_path) as bus:
        assert await copies(bus) == dict.fromkeys(STREAMS, 3)
        async for delivery in bus.follow(topology.JOB_PHASES):
            assert delivery.message.job == "before"
            break


async def test_a_killed_leader_loses_nothing_and_doubles_nothing(cluster: Cluster, tmp_path: Path) -> None:
    async with connected(cluster.url, tmp_path) as bus, connected(cluster.url, tmp_path) as other:
        seen: list[str] = []

        async def read() -> None:
            async for delivery in other.follow(topology.JOB_PHASES):
                seen.append(delivery.message.job)
                if len(seen) == MESSAGES:
                    return

        async def publish() -> None:
            for number in range(MESSAGES):
                job = f"job-{number}"
                await bus.publish(topology.JOB_PHASES, JobChanged(job=job, phase="queued"), msg_id=job, job=job)
                if number == MESSAGES // 3:
                    await cluster.kill(await leader_of(bus, topology.EVENTS.name))

        async with asyncio.timeout(120):
            await asyncio.gather(read(), publish())
        assert seen == [f"job-{number}" for number in range(MESSAGES)]
        assert (await bus.stream_context.stream_info(topology.EVENTS.name)).state.messages == MESSAGES


async def test_work_and_leases_go_on_when_a_leader_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    handled: list[str] = []

    async def handle(delivery: Delivery[SampleRequest]) -> None:
        handled.append(delivery.message.request_id)
        await bus.answer(SampleResult(request_id=delivery.message.request_id))

    async with connected(cluster.url, tmp_path) as bus, sampling_worker(bus, handle):
        table = bus.table(topology.LEASES)

        async def ask() -> None:
            request = SampleRequest(request_id=bus.new_request(), base_model="tiny", prompt=Int32s([1]))
            await bus.ask(topology.SAMPLES, request, pool="tiny")

        async with asyncio.timeout(150):
            await asyncio.gather(*(ask() for _ in range(20)))
            old = await table.put("run", Lease(holder="a"))
            revision = await table.put("run", Lease(holder="a"))
            await cluster.kill(await leader_of(bus, "KV_leases"))
            await asyncio.gather(*(ask() for _ in range(20)))
            # The lease may have expired meanwhile, but nobody else can have it by the old revision.
            assert await table.update("run", Lease(holder="thief"), old) is None
            assert await table.put("run", Lease(holder="b")) > revision
    assert len(set(handled)) == 40


async def test_whoever_reads_an_entry_sees_what_anybody_has_written_before(cluster: Cluster, tmp_path: Path) -> None:
    # With direct reads, which any server answers, some of these see an older revision.
    async with contextlib.AsyncExitStack() as stack:
        urls = [cluster.url_of(f"nats-{number}") for number in range(3)]
        tables = [(await stack.enter_async_context(connected(u, tmp_path))).table(topology.LEASES) for u in urls]
        for number in range(300):
            revision = await tables[number % 3].put("run", Lease(holder=str(number)))
            entry = await tables[(number + 1) % 3].get("run")
            assert entry is not None
            assert entry.revision >= revision


async def test_a_cluster_that_is_not_complete_is_waited_for(tmp_path: Path) -> None:
    async with running_cluster(tmp_path / "nats", servers=2) as cluster:
        connecting = asyncio.create_task(_connect_once(cluster.url_of("nats-0"), tmp_path))
        await asyncio.sleep(1.5)
        assert not connecting.done()
        await cluster.start("nats-2")
        assert await connecting == 3


async def _connect_once(url: str, tmp_path: Path) -> int | None:
    async with connected(url, tmp_path) as bus:
        return (await bus.stream_context.stream_info("TRAIN")).config.num_replicas


async def test_too_few_servers_are_named(
    cluster: Cluster, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(cluster.url, tmp_path, replicas=1):  # they have found each other
        monkeypatch.setattr(provision, "PATIENCE", 1.0)
    with pytest.raises(UserError, match=r"is to be kept by 5 servers \(stream_replicas\)"):
        async with connected(cluster.url, tmp_path, replicas=5):
            pass
    with pytest.raises(UserError, match=r"is to be kept by 3 servers \(stream_replicas\)"):
        async with connected(nats_server.url, tmp_path):
            pass


async def test_a_wrong_password_is_refused_in_words(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not let us in: check nats_user") as refused:
        async with connected(cluster.url, tmp_path, login=Login(user="openrl", password="a-guess")):
            pass
    assert "a-guess" not in str(refused.value)


async def test_what_the_probes_of_the_manifests_ask_is_answered(cluster: Cluster, tmp_path: Path) -> None:
    async with connected(cluster.url, tmp_path) as bus, aiohttp.ClientSession() as http:
        leader = await leader_of(bus, "TRAIN")
        await cluster.kill(leader)
        others = [name for name in ("nats-0", "nats-1", "nats-2") if name != leader]
        for path in ("/healthz?js-enabled-only=true", "/healthz?js-server-only=true"):
            async with asyncio.timeout(60):
                while True:
                    answers = [await http.get(cluster.monitor(name) + path) for name in others]
                    if all(answer.status == 200 for answer in answers):
                        break
                    await asyncio.sleep(0.2)
