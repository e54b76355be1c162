"""The `tinker` command line, as people run it, against a gateway."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tinker
from tinker import types

from shared.bus import Bus
from tests.mesh.fake_hub import FakeHub
from tests.mesh.gateways import KEY, add_key, sdk
from tests.mesh.harness import MODEL, Place
from tests.mesh.tinker_commands import Commands, tinker_commands


def train(service: tinker.ServiceClient) -> tuple[str, str]:
    """A run with one of each checkpoint; paths of those to train from and to download."""
    training = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([5, 6, 7]),
        loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [1.0] * 3},  # type: ignore[dict-item]
    )
    training.forward_backward([datum], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=0.02)).result()
    training.save_weights_for_sampler("sampler").result()
    state, external = training.save_state("state"), training.save_weights_external("files")
    return state.result().path, external.result().path


@pytest.mark.timeout(300)
async def test_every_command_does_what_it_says(place: Place, bus: Bus, tmp_path: Path) -> None:
    await add_key(bus, admin=True)
    async with place.trainer(), place.gateway(exchange_keys=True) as gateway, sdk(gateway.port) as service:
        url, home = f"http://127.0.0.1:{gateway.port}", tmp_path / "home"
        state, external = await asyncio.to_thread(train, service)
        run = state.split("/")[2]
        async with FakeHub().serving() as hub:
            known = {"TINKER_BASE_URL": url, "TINKER_API_KEY": KEY, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x"}
            async with tinker_commands(home, **known) as cli:
                await models_and_runs(cli, run, state)
                await checkpoints(cli, run, state)
                await pushes(cli, external, hub)
                await downloads(cli, state, external, home)
                await sessions_and_billing(cli, run, url)


async def models_and_runs(cli: Commands, run: str, state: str) -> None:
    assert (await cli.json("model", "list"))["models"][0]["model_name"] == MODEL
    assert MODEL in await cli.run("model", "list", "tiny")
    runs = (await cli.json("run", "list"))["runs"]
    assert [(each["training_run_id"], each["lora_rank"]) for each in runs] == [(run, 8)]
    assert (await cli.json("run", "info", run))["last_checkpoint"]["tinker_path"] == state


async def checkpoints(cli: Commands, run: str, state: str) -> None:
    listed = (await cli.json("checkpoint", "list", "--run-id", run))["checkpoints"]
    assert sorted(each["checkpoint_type"] for each in listed) == ["external", "sampler", "training"]
    assert len((await cli.json("checkpoint", "list"))["checkpoints"]) == 3
    assert "(2 more not shown" in await cli.run("checkpoint", "list", "--limit", "1")
    await cli.run("checkpoint", "publish", state)
    assert (await cli.json("checkpoint", "info", state))["public"] is True
    await cli.run("checkpoint", "unpublish", state)
    await cli.run("checkpoint", "set-ttl", state, "--ttl", "7200")
    info = await cli.json("checkpoint", "info", state)
    assert (info["public"], info["lora_rank"]) == (False, 8)
    assert datetime.fromisoformat(info["expires_at"]).timestamp() < time.time() + 7300
    await cli.run("checkpoint", "set-ttl", state, "--remove")
    assert (await cli.json("checkpoint", "info", state))["expires_at"] is None
    assert "ttl_seconds" in await cli.run("checkpoint", "set-ttl", state, "--ttl", "5", fails=True)
    assert "not found" in (await cli.run("checkpoint", "publish", state + "-not", fails=True)).lower()


async def pushes(cli: Commands, external: str, hub: FakeHub) -> None:
    pushed = await cli.json("checkpoint", "push-hf", external, "--repo", "me/adapter")
    assert pushed["repo_id"] == "me/adapter"
    assert hub.private == {"me/adapter": True}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == set(hub.files)
    assert json.loads(hub.files["adapter_config.json"])["r"] == 8
    assert f"- Base model: {MODEL}" in hub.files["README.md"].decode()


async def downloads(cli: Commands, state: str, external: str, home: Path) -> None:
    sizes = {}
    for path in (external, state):
        told = await cli.json("checkpoint", "download", path, "--output", str(home / "adapters"))
        files = {file.name: file.stat().st_size for file in Path(told["destination"]).iterdir()}
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
        assert told["file_size_bytes"] == sum(files.values())
        sizes[path] = files["adapter_model.safetensors"]
    assert sizes[external] == sizes[state]
    # What a training checkpoint was exported through is not left behind.
    assert len((await cli.json("checkpoint", "list"))["checkpoints"]) == 3
    assert json.loads(await cli.run("--format", "json", "checkpoint", "delete", state, external, "--yes")) == {
        "deleted_count": 2,
        "failed": [],
    }
    left = (await cli.json("checkpoint", "list"))["checkpoints"]
    assert [each["checkpoint_type"] for each in left] == ["sampler"]


async def sessions_and_billing(cli: Commands, run: str, url: str) -> None:
    session = run.split(":", maxsplit=1)[0]
    trace = await cli.json("session", "export-trace", session)
    assert Path(trace["destination"]).stat().st_size == trace["file_size_bytes"] > 0
    assert (await cli.run("session", "export-trace", session, "--url-only")).startswith(url)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    begin, end = hour - timedelta(hours=1), hour + timedelta(hours=1)
    usage = await cli.json("billing", "usage", begin.isoformat(), end.isoformat())
    kinds = {each["event_info"]["type"] for each in usage["data"]}
    assert {"checkpoint", "storage"} <= kinds
    storage = await cli.json("billing", "checkpoint-storage")
    assert [(each["project_id"], each["checkpoint_count"]) for each in storage["data"]] == [("default", 1)]


async def test_keys_are_checked_stored_and_told_about(place: Place, bus: Bus, tmp_path: Path) -> None:
    await add_key(bus)
    async with place.gateway(exchange_keys=True) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        async with tinker_commands(tmp_path / "home", TINKER_BASE_URL=url) as cli:
            assert (await cli.json("auth", "whoami", key=KEY))["user_urn"] == "tml:organization_user:default"
            assert "accessible: yes" in await cli.run("auth", "status", key=KEY)
            assert "tinker" in await cli.run("version")
            assert "not known" in await cli.run("auth", "login", stdin="tml-not-a-key\n", fails=True)
            assert "Logged in as default (openrl)" in await cli.run("auth", "login", stdin=f"{KEY}\n")
            assert (await cli.json("run", "list")) == {"runs": []}
            assert "Removed credential 'key-of-default'" in await cli.run("auth", "logout")
