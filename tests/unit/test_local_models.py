"""The registry of models, what is refused as a model, and the checks of fetched files."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.local import models
from services.local.config import Paths
from services.local.state import MeshState, ServiceState, held_lock, write_state
from shared.errors import UserError
from shared.models import fetch
from tests.engines.tiny import make_tiny_model

EMPTY_WEIGHTS = "\x02" + "\0" * 7 + "{}"
"""A safetensors file without tensors."""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths.of(tmp_path / "data")


@pytest.fixture
def told() -> list[str]:
    return []


def model_directory(path: Path, *files: str) -> Path:
    path.mkdir()
    for file in files or ("config.json", "model.safetensors", "tokenizer.json"):
        (path / file).write_text(EMPTY_WEIGHTS if file.endswith(".safetensors") else "{}")
    return path


def weights(path: Path) -> bytes:
    save_file({"a": np.zeros((4, 4), np.float32)}, path)
    return path.read_bytes()


def test_weights_that_were_cut_off_are_refused(paths: Paths, tmp_path: Path, told: list[str]) -> None:
    directory = model_directory(tmp_path / "cut")
    file = directory / "model.safetensors"
    whole = weights(file)
    assert models.add(paths, "whole", str(directory), tell=told.append) == directory
    cuts = {
        len(whole) - 1: f"has {len(whole) - 1} bytes and should have {len(whole)}: it is damaged",
        20: "is no safetensors file, or its beginning is damaged",
        0: "is no safetensors file",
    }
    for length, complaint in cuts.items():
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=complaint):
            models.add(paths, "cut", str(directory), tell=told.append)
    file.write_bytes(whole)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(UserError, match="lacks model-2.safetensors, which model.safetensors.index.json names"):
        models.add(paths, "cut", str(directory), tell=told.append)


def test_a_tokenizer_without_a_chat_template_is_warned_of(paths: Paths, tmp_path: Path, told: list[str]) -> None:
    directory = model_directory(tmp_path / "base")
    models.add(paths, "base", str(directory), tell=told.append)
    assert len(told) == 1
    assert told[0].startswith(f"warning: the tokenizer in {directory} has no chat template")
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    models.add(paths, "base", str(directory), tell=told.append)
    assert len(told) == 1


def test_a_file_is_no_model_directory(paths: Paths, tmp_path: Path, told: list[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a directory"):
        models.add(paths, "s", str(tmp_path / "file"), tell=told.append)


def test_a_model_that_went_away_is_named_with_the_way_to_go_on(paths: Paths, tmp_path: Path, told: list[str]) -> None:
    for name in ("good", "gone"):
        models.add(paths, name, str(model_directory(tmp_path / name)), tell=told.append)
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(UserError, match="'gone' cannot be served: .* does not exist.*`openrl model remove gone`"):
        models.chosen(paths, [])
    assert list(models.chosen(paths, ["good"])) == ["good"]


def test_a_directory_is_registered_where_it_is(paths: Paths, tmp_path: Path, told: list[str]) -> None:
    directory = model_directory(tmp_path / "tiny")
    assert models.add(paths, "org/tiny", str(directory), tell=told.append) == directory
    assert models.add(paths, "org/tiny", str(directory), tell=told.append) == directory
    assert models.registered(paths) == {"org/tiny": directory}
    assert models.remove(paths, "org/tiny") is None
    assert directory.exists()
    assert models.registered(paths) == {}


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (["model.safetensors", "tokenizer.json"], "has no config.json"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "without weights: it needs .* .safetensors"),
        (["config.json", "model.safetensors"], "a model directory without a tokenizer: put tokenizer.json"),
    ],
)
def test_what_a_model_directory_lacks_is_named(
    paths: Paths, tmp_path: Path, told: list[str], files: list[str], complaint: str
) -> None:
    directory = model_directory(tmp_path / "broken", *files)
    with pytest.raises(UserError, match=complaint):
        models.add(paths, "broken", str(directory), tell=told.append)
    assert models.registered(paths) == {}


@pytest.mark.parametrize("source", ["./missing", "/missing/model", "missing", "a/b/c"])
def test_a_path_that_is_not_there_is_named(paths: Paths, told: list[str], source: str) -> None:
    with pytest.raises(UserError, match="does not exist: name a directory, or a hub id"):
        models.add(paths, "tiny", source, tell=told.append)


@pytest.mark.parametrize("name", ["", "../up", "a b", "a/b/c", "-x", "x" * 97, "ü"])
def test_a_name_that_cannot_be_used_is_refused(paths: Paths, tmp_path: Path, told: list[str], name: str) -> None:
    with pytest.raises(UserError, match="cannot be used: letters, digits"):
        models.add(paths, name, str(tmp_path), tell=told.append)


def test_a_name_needs_a_source_unless_it_is_the_demo_model(paths: Paths, told: list[str]) -> None:
    with pytest.raises(UserError, match="where is model 'other'.*smollm2-135m-instruct"):
        models.add(paths, "other", None, tell=told.append)


def test_a_taken_name_is_not_taken_over(paths: Paths, tmp_path: Path, told: list[str]) -> None:
    models.add(paths, "tiny", str(model_directory(tmp_path / "a")), tell=told.append)
    with pytest.raises(UserError, match=r"is registered as .*/a: remove it first"):
        models.add(paths, "tiny", str(model_directory(tmp_path / "b")), tell=told.append)


def test_models_to_serve_are_those_named_or_all(paths: Paths, tmp_path: Path, told: list[str]) -> None:
    with pytest.raises(UserError, match="no model is registered .*openrl model add"):
        models.chosen(paths, [])
    for name in ("a", "b"):
        models.add(paths, name, str(model_directory(tmp_path / name)), tell=told.append)
    assert list(models.chosen(paths, [])) == ["a", "b"]
    assert list(models.chosen(paths, ["b"])) == ["b"]
    with pytest.raises(UserError, match="'c' is not registered: .*registered: a, b"):
        models.chosen(paths, ["c"])
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(UserError, match=r"/a has no config.json"):
        models.chosen(paths, [])


def test_fetched_files_go_with_the_name_and_a_served_model_stays(paths: Paths, told: list[str]) -> None:
    paths.make()
    directory = paths.models / "tiny"
    paths.models.mkdir()
    model_directory(directory)
    models.add(paths, "tiny", str(directory), tell=told.append)
    served = ServiceState(name="sampler-tiny", service="sampler", base_model="tiny")
    write_state(paths, MeshState(pid=1, data="", started=0.0, services=[served]))
    with held_lock(paths), pytest.raises(UserError, match="is being served: end the mesh"):
        models.remove(paths, "tiny")
    assert models.remove(paths, "tiny") == directory
    assert not directory.exists()


def test_a_damaged_registry_is_named(paths: Paths) -> None:
    paths.make()
    paths.registry.write_text("[")
    with pytest.raises(UserError, match=r"models.json cannot be read"):
        models.registered(paths)


def test_a_fetch_that_fails_is_told_in_its_last_words(paths: Paths, told: list[str]) -> None:
    with pytest.raises(UserError, match="model 'nobody' could not be fetched: model 'nobody' is not known"):
        models.fetch(paths.models / "nobody", "nobody", None, told.append)
    assert list(paths.models.iterdir()) == []


def test_files_appear_all_at_once_or_not_at_all(tmp_path: Path) -> None:
    def half(part: Path) -> None:
        (part / "config.json").touch()
        assert not (tmp_path / "model").exists()
        raise UserError("the line went dead")

    with pytest.raises(UserError, match="the line went dead"):
        fetch.into(tmp_path / "model", half, chatml=False)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    fetch.fetch("anything", directory, None)  # unknown, so it would be refused if it had to be had
    assert (directory / "config.json").read_text() == "{}"


def test_of_two_who_fetch_the_same_model_the_slower_one_is_content(tmp_path: Path) -> None:
    def overtaken(part: Path) -> None:
        (part / "config.json").write_text("second")
        model_directory(tmp_path / "model")

    fetch.into(tmp_path / "model", overtaken, chatml=False)
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fetched_files_can_be_read_by_others(tmp_path: Path) -> None:
    def fill(part: Path) -> None:
        (part / "weights").touch(mode=0o600)

    mask = os.umask(0o022)
    try:
        fetch.into(tmp_path / "model", fill, chatml=False)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "model" / "weights").stat().st_mode) == 0o644


def test_a_model_that_does_not_end_its_turns_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "tiny")
    fetch.check_chatml(directory)
    generation = directory / "generation_config.json"
    settings = json.loads(generation.read_text())
    generation.write_text(json.dumps(settings | {"eos_token_id": [1, 2]}))
    with pytest.raises(UserError, match=r"does not end its turns: eos_token_id is \[1, 2\]"):
        fetch.check_chatml(directory)


def test_a_model_without_a_chatml_template_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "tiny")
    for file in directory.glob("chat_template*"):
        file.unlink()
    with pytest.raises(UserError, match="has no ChatML template"):
        fetch.check_chatml(directory)


def test_a_package_without_the_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no .gguf file"):
        fetch.unpacked(tmp_path)
