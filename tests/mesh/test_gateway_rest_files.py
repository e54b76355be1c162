"""Files that a gateway serves by links: adapters, whole and in ranges, never damaged in silence; and traces."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import tinker
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as perfetto
from tinker import types

from shared import topology
from shared.bus import Bus
from shared.contracts.base import Failure
from shared.contracts.results import RequestFailed
from shared.contracts.sampling import SampleResult
from shared.contracts.sessions import SamplerRecord
from shared.contracts.tenants import UsageRecorded
from shared.contracts.training import OperationResult
from tests.mesh.gateway_records import NOW, Records, ask, client
from tests.mesh.gateways import KEY, OTHER_KEY, add_key, sdk
from tests.mesh.harness import MODEL, Place

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")

WEIGHTS = bytes(range(256)) * 40_000
"""More than is read at once."""


async def adapter(records: Records, name: str = "a", **fields: object) -> str:
    run = await records.run(await records.session("s-1", NOW), 0, NOW)
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
    return await records.checkpoint(run, "external", name, NOW, files=files, **fields)  # type: ignore[arg-type]


async def fetch(url: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=30) as plain:
        return await plain.get(url, headers=headers)


async def test_files_are_fetched_without_a_key_whole_and_in_ranges(gateway: str, records: Records) -> None:
    rest = await client(gateway)
    path = await adapter(records)
    found = await ask(lambda: rest.get_external_weights_urls(path))
    assert found == await rest.get_external_weights_urls_async(path)
    assert set(found.urls) == {"adapter_config.json", "adapter_model.safetensors"}
    assert found.expires.tzinfo is not None
    assert found.expires.timestamp() == pytest.approx(time.time() + 3600, abs=60)
    url = found.urls["adapter_model.safetensors"]
    assert url.startswith(gateway)

    whole = await fetch(url)
    assert (whole.status_code, whole.content, whole.headers["content-length"]) == (200, WEIGHTS, str(len(WEIGHTS)))
    part = await fetch(url, Range="bytes=100-299")
    assert (part.status_code, part.content) == (206, WEIGHTS[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(WEIGHTS)}"
    rest_of_it = await fetch(url, Range=f"bytes={len(WEIGHTS) // 2}-", **{"If-Range": whole.headers["etag"]})
    assert (rest_of_it.status_code, rest_of_it.content) == (206, WEIGHTS[len(WEIGHTS) // 2 :])
    changed = await fetch(url, Range="bytes=0-1", **{"If-Range": '"another"'})
    assert (changed.status_code, len(changed.content)) == (200, len(WEIGHTS))
    behind = await fetch(url, Range=f"bytes={len(WEIGHTS)}-")
    assert (behind.status_code, behind.headers["content-range"]) == (416, f"bytes */{len(WEIGHTS)}")


async def test_a_link_is_good_for_one_file_for_a_while(gateway: str, records: Records) -> None:
    rest, theirs = await client(gateway), await client(gateway, OTHER_KEY)
    path = await adapter(records, expires=time.time() + 900)
    urls = (found := await ask(lambda: rest.get_external_weights_urls(path))).urls
    assert found.expires.timestamp() <= time.time() + 900
    config, weights = urls["adapter_config.json"], urls["adapter_model.safetensors"]
    signature = urlsplit(config).query
    for bad in (
        config.split("?")[0],
        config[:-1] + ("0" if config[-1] != "0" else "1"),
        config.replace("expires=", "expires=9"),
        f"{weights.split('?')[0]}?{signature}",
        f"{weights.split('?')[0]}/../adapter_config.json?x={signature}",
    ):
        assert (await fetch(bad)).status_code in (403, 404), bad
    with pytest.raises(tinker.NotFoundError):
        await ask(lambda: theirs.get_external_weights_urls(path))
    await ask(lambda: rest.delete_checkpoint_from_tinker_path(path))
    assert (await fetch(config)).status_code == 404


async def test_another_gateway_of_the_mesh_serves_the_same_link(gateway: str, records: Records, place: Place) -> None:
    rest = await client(gateway)
    path = await adapter(records)
    url = (await ask(lambda: rest.get_external_weights_urls(path))).urls["adapter_config.json"]
    async with place.gateway(replica="gateway-2") as second:
        there = url.replace(gateway, f"http://127.0.0.1:{second.port}")
        assert (await fetch(there)).content == b"{}"


async def test_a_damaged_file_is_never_given_out_whole(gateway: str, records: Records, place: Place) -> None:
    rest = await client(gateway)
    path = await adapter(records)
    url = (await ask(lambda: rest.get_external_weights_urls(path))).urls["adapter_model.safetensors"]
    file = next((place.directory / "blobs").rglob("adapter_model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(httpx.RemoteProtocolError):
        await fetch(url)
    assert (await fetch(url, Range="bytes=0-9")).status_code == 500
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(httpx.RemoteProtocolError):
        await fetch(url)
    file.unlink()
    gone = await fetch(url)
    assert (gone.status_code, "missing" in gone.json()["error"]) == (500, True)


async def test_what_has_no_files_says_how_to_get_some(gateway: str, records: Records) -> None:
    run = await records.run(await records.session("s-1", NOW), 0, NOW)
    await records.checkpoint(run, "training", "a", NOW)
    async with httpx.AsyncClient(headers={"X-API-Key": KEY}) as plain:
        url = f"{gateway}/api/v1/training_runs/{run}/checkpoints/weights/a/external_weights_urls"
        answer = await plain.get(url)
    assert answer.status_code == 400
    assert "save_weights_external" in answer.json()["detail"]


async def test_a_trace_tells_what_a_session_did(gateway: str, records: Records, bus: Bus, tmp_path: Path) -> None:
    session = await records.session("s-1", NOW - 50, display_name="nightly")
    run = await records.run(session, 0, NOW - 40)
    await records.checkpoint(run, "training", "a", NOW - 30)
    sampler = SamplerRecord(sampler="s-1:sample:0", session="s-1", owner="default", base_model=MODEL, created=NOW - 20)
    await bus.table(topology.SAMPLERS).put(sampler.sampler, sampler)
    for result in (
        OperationResult(request_id="s-1.train-0.1", run=run, seq=1, op="forward_backward", submitted=time.time() - 2),
        RequestFailed(request_id="s-1.train-0.2", failure=Failure(message="too long", kind="user")),
        SampleResult(request_id="s-1.sample-0.1", queue_seconds=0.25, seconds=0.5),
        SampleResult(request_id="s-1.sample-0.2", queue_seconds=0.25, seconds=0.5),
        SampleResult(request_id="s-2.sample-0.1", seconds=0.5),
    ):
        await bus.answer(result)
    used = UsageRecorded(
        owner="default", kind="sampled", tokens=100, begin=NOW - 10, end=NOW, base_model=MODEL, session="s-1"
    )
    await bus.publish(topology.USED, used, owner="default")
    rest = await client(gateway)

    url = await ask(lambda: rest.export_session_trace("s-1"))
    assert (await rest.export_session_trace_async("s-1")).split("?")[0] == url.split("?")[0]
    await asyncio.to_thread(urllib.request.urlretrieve, url, tmp_path / "s-1.pftrace")
    trace = perfetto.Trace.FromString((tmp_path / "s-1.pftrace").read_bytes())
    tracks = {packet.track_descriptor.name for packet in trace.packet if packet.HasField("track_descriptor")}
    assert tracks >= {"session nightly", f"training run {run}", "sampler s-1:sample:0"}
    events = [packet.track_event for packet in trace.packet if packet.HasField("track_event")]
    begun = [event.name for event in events if event.type == perfetto.TrackEvent.TYPE_SLICE_BEGIN]
    assert sorted(begun) == ["forward_backward", "sample", "sample", "session", "waiting", "waiting"]
    assert len(begun) == len([event for event in events if event.type == perfetto.TrackEvent.TYPE_SLICE_END])
    instants = [event for event in events if event.type == perfetto.TrackEvent.TYPE_INSTANT]
    assert sorted(event.name for event in instants) == ["checkpoint a", "created", "created", "failed"]
    rates = [event.double_counter_value for event in events if event.type == perfetto.TrackEvent.TYPE_COUNTER]
    assert rates == [10.0, 0.0]
    theirs = await client(gateway, OTHER_KEY)
    with pytest.raises(tinker.NotFoundError):
        await ask(lambda: theirs.export_session_trace("s-1"))
    with pytest.raises(urllib.error.HTTPError):
        await asyncio.to_thread(urllib.request.urlopen, url.replace("s-1", "s-2"))


async def test_what_a_real_run_saves_is_listed_copied_loaded_and_downloaded(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.trainer(), place.gateway() as service, sdk(service.port) as there:
        rest = await client(f"http://127.0.0.1:{service.port}")

        def script() -> tuple[str, dict[str, str]]:
            training = there.create_lora_training_client(base_model=MODEL, rank=8, seed=1).result()
            datum = types.Datum(
                model_input=types.ModelInput.from_ints([5, 6, 7]),
                loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [1.0] * 3},  # type: ignore[dict-item]
            )
            training.forward_backward([datum], "cross_entropy").result()
            training.optim_step(types.AdamParams(learning_rate=0.02)).result()
            state = training.save_state("state").result().path
            training.save_weights_for_sampler("sampler").result()
            external = training.save_weights_external("files").result().path
            run = rest.get_training_run_by_tinker_path(state).result()
            assert (run.base_model, run.lora_rank) == (MODEL, 8)
            assert run.last_checkpoint is not None
            assert run.last_checkpoint.tinker_path == state
            names = [each.checkpoint_id for each in rest.list_checkpoints(run.training_run_id).result().checkpoints]
            assert sorted(names) == ["external_weights/files", "sampler_weights/sampler", "weights/state"]
            copied = rest.copy_weights(state, "archive").result()
            rest.delete_checkpoint_from_tinker_path(state).result()
            again = there.create_training_client_from_state(copied).result()
            assert again.get_info().lora_rank == 8
            with pytest.raises(tinker.NotFoundError):
                there.create_training_client_from_state(state).result()
            url = rest.export_session_trace(run.training_run_id.split(":")[0]).result()
            return url, rest.get_external_weights_urls(external).result().urls

        url, urls = await asyncio.to_thread(script)
        trace = perfetto.Trace.FromString((await fetch(url)).content)
        slices = [each.track_event.name for each in trace.packet if each.track_event.type == 1]
        assert {"create", "forward_backward", "optim_step", "save_state", "save_policy", "save_external"} <= set(slices)
        content = {name: (await fetch(url)).content for name, url in urls.items()}
        assert set(content) == {"adapter_config.json", "adapter_model.safetensors"}
        assert b'"r": 8' in content["adapter_config.json"]
