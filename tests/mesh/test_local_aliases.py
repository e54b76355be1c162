"""Other names of models: kept in the data directory, and told to the mesh."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.local import aliases, models
from services.local.config import Paths
from shared import topology
from shared.bus import Bus
from shared.errors import UserError
from tests.mesh.gateways import add_key, http
from tests.mesh.harness import MODEL, Place
from tests.mesh.local_runs import openrl


@pytest.fixture
def paths(tmp_path: Path, tiny_model: Path) -> Paths:
    place = Paths.of(tmp_path / "data")
    for name in ("tiny", "other"):
        models.add(place, name, str(tiny_model), tell=lambda text: None)
    return place


def test_an_alias_is_kept_and_can_move_to_another_model(paths: Paths) -> None:
    aliases.add(paths, "Qwen/Qwen3-8B", "tiny")
    aliases.add(paths, "b", "tiny")
    aliases.add(paths, "b", "other")
    assert aliases.registered(paths) == {"Qwen/Qwen3-8B": "tiny", "b": "other"}
    aliases.remove(paths, "b")
    assert aliases.forget_model(paths, "tiny") == ["Qwen/Qwen3-8B"]
    assert aliases.registered(paths) == {}


@pytest.mark.parametrize(
    ("alias", "model", "says"),
    [
        ("tiny", "other", "itself"),
        ("a", "absent", "not registered"),
        ("a:b", "tiny", "cannot be used"),
        ("a/b/c", "tiny", "cannot be used"),
        ("../a", "tiny", "cannot be used"),
        ("", "tiny", "cannot be used"),
    ],
)
def test_an_alias_that_cannot_be_is_refused_in_words(paths: Paths, alias: str, model: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        aliases.add(paths, alias, model)
    with pytest.raises(UserError, match="no alias"):
        aliases.remove(paths, "never")


def test_a_damaged_file_of_aliases_is_named(paths: Paths) -> None:
    paths.aliases.write_text("{")
    with pytest.raises(UserError, match="aliases.json"):
        aliases.registered(paths)


async def test_the_mesh_knows_exactly_the_aliases_of_the_data_directory(paths: Paths, bus: Bus) -> None:
    aliases.add(paths, "a", "tiny")
    aliases.add(paths, "b", "tiny")
    await aliases.tell(bus, paths)
    aliases.add(paths, "b", "other")
    aliases.remove(paths, "a")
    await aliases.tell(bus, paths)
    assert {entry.key[0]: entry.value for entry in await bus.table(topology.ALIASES).items()} == {"b": "other"}


async def test_a_gateway_lists_a_model_under_its_aliases(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.trainer(), place.gateway() as gateway, http(gateway.port) as client:
        await bus.table(topology.ALIASES).put("Qwen/Qwen3-8B", MODEL)
        async with asyncio.timeout(20):
            while True:
                listed = (await client.get("get_server_capabilities")).json()["supported_models"]
                if [each["model_name"] for each in listed] == [MODEL, "Qwen/Qwen3-8B"]:
                    break
                await asyncio.sleep(0.05)
        assert all(each["trainable"] for each in listed)


async def test_the_command_makes_shows_and_forgets_aliases(paths: Paths) -> None:
    assert "no model has an alias" in (await openrl(paths, "model", "alias")).out
    assert "b now names model tiny" in (await openrl(paths, "model", "alias", "b", "tiny")).out
    assert (await openrl(paths, "model", "alias", "--json")).json == {"b": "tiny"}
    assert (await openrl(paths, "model", "alias", "b")).code == 2
    assert "no longer" in (await openrl(paths, "model", "alias", "b", "--remove")).out
    assert (await openrl(paths, "model", "alias", "b", "--remove")).code == 2
