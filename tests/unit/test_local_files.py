"""What the supervisor writes and reads: settings, state, lock, logs."""

from __future__ import annotations

import importlib.util
import json
import os
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.config import CoordinatorConfig
from services.environment.config import EnvironmentConfig
from services.local import logs
from services.local.config import Paths, Setting, mesh_commands, slugs, write_toml
from services.local.machine import SamplerEngine, check_engine
from services.local.state import (
    MeshState,
    ServiceState,
    held_lock,
    lock_holder,
    read_state,
    require_running,
    running_state,
    write_state,
)
from services.reward.config import RewardConfig
from services.sampler.config import SamplerConfig
from services.trainer.config import TrainerConfig
from shared.config import ServiceConfig, load
from shared.errors import UserError


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths.of(tmp_path / "data")
    paths.make()
    return paths


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)  # it writes files
@given(text=TEXT, table=st.dictionaries(TEXT, TEXT))
def test_settings_come_back_from_toml_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, text: str, table: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "settings.toml"
    written: dict[str, Setting] = {"models": table, "text": text, "port": 4222, "share": 0.5, "on": True}
    write_toml(path, written)
    assert tomllib.loads(path.read_text()) == written


def test_every_service_accepts_the_settings_that_are_written_for_it(paths: Paths) -> None:
    kinds: dict[str, type[ServiceConfig]] = {
        "coordinator": CoordinatorConfig,
        "environment": EnvironmentConfig,
        "reward": RewardConfig,
        "sampler": SamplerConfig,
        "trainer": TrainerConfig,
    }
    for command in mesh_commands(paths, {"org/Tiny-0.1": Path("/models/tiny")}):
        file = paths.configs / "config.toml"
        write_toml(file, command.config)
        config = load(kinds[command.service], command.service, file, {})
        assert {name: getattr(config, name) for name in command.config} == command.config


def test_a_mesh_has_a_sampler_and_a_trainer_for_each_model(paths: Paths) -> None:
    names = [command.name for command in mesh_commands(paths, {"a/b": Path("/x"), "A.b": Path("/y")})]
    assert names == [
        "coordinator", "environment", "reward", "sampler-a-b", "trainer-a-b", "sampler-a-b-2", "trainer-a-b-2",
    ]  # fmt: skip


def test_a_gateway_on_any_free_port_has_the_same_one_after_a_restart(paths: Paths) -> None:
    (gateway,) = [each for each in mesh_commands(paths, {}, gateway_port=0) if each.service == "gateway"]
    assert gateway.config["port"] != 0


@given(st.lists(st.text(min_size=1, max_size=80), unique=True, max_size=6))
def test_slugs_are_different_and_plain(names: list[str]) -> None:
    found = slugs(names)
    assert len(set(found)) == len(names)
    assert all(set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and slug for slug in found)


def test_the_lock_admits_one_and_names_it(paths: Paths) -> None:
    assert lock_holder(paths) is None
    with held_lock(paths):
        assert lock_holder(paths) == os.getpid()
        with pytest.raises(UserError, match=rf"already running on .* \(process {os.getpid()}\)"), held_lock(paths):
            pass
    assert lock_holder(paths) is None
    with held_lock(paths):
        pass


def test_state_counts_only_while_the_lock_is_held(paths: Paths) -> None:
    state = MeshState(pid=1, data="x", started=0.0, services=[ServiceState(name="a", service="a", pid=2)])
    write_state(paths, state)
    assert read_state(paths) == state
    assert running_state(paths) is None
    with pytest.raises(UserError, match="no mesh is running"):
        require_running(paths)
    with held_lock(paths):
        assert running_state(paths) == state
        with pytest.raises(UserError, match="still starting"):
            require_running(paths)


def test_a_damaged_state_file_is_no_state(paths: Paths) -> None:
    paths.state.write_text('{"pid": ')
    assert read_state(paths) is None


def entry(when: str, message: str, **fields: str) -> str:
    line = {"time": f"2026-11-22T10:00:{when}+00:00", "level": "info", "replica": "a", "message": message, **fields}
    return json.dumps(line) + "\n"


def test_logs_are_merged_by_time_with_nats_servers_own_form(paths: Paths) -> None:
    paths.log("a").write_text(entry("01.000", "first", job="j") + entry("03.000", "third"))
    local = datetime(2026, 11, 22, 10, 0, 2, tzinfo=UTC).astimezone().strftime("%Y/%m/%d %H:%M:%S.%f")
    (paths.nats / "nats.log").write_text(f"[7] {local} [INF] second\n")
    lines = logs.last_lines(logs.files(paths, None), 10)
    assert [line.fields["message"] for line in lines] == ["first", "second", "third"]
    assert lines[0].text.endswith("info    a            first  job=j")
    assert lines[1].fields["level"] == "info"
    assert [line.fields["message"] for line in logs.last_lines(logs.files(paths, None), 2)] == ["second", "third"]
    assert logs.last_lines(logs.files(paths, None), 0) == []


def test_bare_text_keeps_its_place_behind_the_line_before_it(paths: Paths) -> None:
    paths.log("a").write_text(entry("01.000", "first") + "Traceback:\n  boom\n")
    paths.log("b").write_text(entry("02.000", "later"))
    lines = logs.last_lines(logs.files(paths, None), 10)
    assert [line.fields["message"] for line in lines] == ["first", "Traceback:", "  boom", "later"]


def test_bare_text_at_the_beginning_stands_before_the_first_line_with_a_time(paths: Paths) -> None:
    paths.log("a").write_text("warning: old\n" + entry("02.000", "second"))
    paths.log("b").write_text(entry("01.000", "first"))
    paths.log("c").write_text("it broke before it could say when\n")
    lines = logs.last_lines(logs.files(paths, None), 10)
    assert [line.fields["message"] for line in lines][:3] == ["first", "warning: old", "second"]
    assert lines[3].when == paths.log("c").stat().st_mtime


def test_a_printed_traceback_is_one_entry_and_every_entry_has_a_level_and_a_service(paths: Paths) -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    boom()\nValueError: no\n'
    paths.log("sampler-tiny").write_text(entry("01.000", "first", service="sampler") + trace + "printed\n")
    (paths.nats / "nats.log").write_text("[7] 2026/11/22 10:00:02.000000 [WRN] slow\n")
    lines = {line.fields["message"]: line.fields for line in logs.last_lines(logs.files(paths, None), 10)}
    assert set(lines) == {"first", "ValueError: no", "printed", "slow"}
    levels = {message: (fields["level"], fields["service"]) for message, fields in lines.items()}
    assert levels["ValueError: no"] == ("error", "sampler")
    assert lines["ValueError: no"]["error"] == trace.rstrip()
    assert levels["printed"] == ("info", "sampler")
    assert levels["slow"] == ("warning", "nats-server")


def test_a_service_is_found_by_its_name_or_its_replicas(paths: Paths) -> None:
    for name in ("sampler-a", "sampler-b", "trainer-a"):
        paths.log(name).touch()
    assert list(logs.files(paths, "sampler")) == ["sampler-a", "sampler-b"]
    assert list(logs.files(paths, "trainer-a")) == ["trainer-a"]
    with pytest.raises(UserError, match="no log of 'gateway'.*sampler-a, sampler-b, trainer-a"):
        logs.files(paths, "gateway")


def test_following_gives_whole_new_lines_of_old_and_new_files(paths: Paths) -> None:
    paths.log("a").write_text(entry("01.000", "old"))
    batches = logs.follow(paths, None)
    assert next(batches) == []
    with paths.log("a").open("a") as file:
        file.write(entry("02.000", "new") + '{"time": "half')
    paths.log("b").write_text(entry("03.000", "from b"))
    assert [line.fields["message"] for line in next(batches)] == ["new", "from b"]
    paths.log("a").write_text(entry("04.000", "r"))  # rotated: shorter than before
    assert [line.fields["message"] for line in next(batches)] == ["r"]


def test_the_last_error_is_the_newest_of_this_life(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert logs.last_error(log) == ""
    log.write_text(entry("01.000", "old", level="error"))
    start = log.stat().st_size
    assert logs.last_error(log, start) == ""
    with log.open("a") as file:
        file.write(entry("02.000", "fine"))
    assert logs.last_error(log, start) == ""
    with log.open("a") as file:
        file.write("Traceback (most recent call last):\nValueError: no\n")
    assert logs.last_error(log, start) == "ValueError: no"
    with log.open("a") as file:
        file.write(entry("03.000", "task failed", level="error", error="Traceback\n  x\nKeyError: 'y'\n"))
    assert logs.last_error(log, start) == "task failed: KeyError: 'y'"


def test_a_large_log_is_put_aside_and_appending_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"x" * 100)
        logs.rotate(log, limit=100)
        assert log.stat().st_size == 100
        writer.write(b"y")
        logs.rotate(log, limit=100)
        writer.write(b"z")
    assert log.read_bytes() == b"z"
    assert (tmp_path / "a.log.1").stat().st_size == 101


def test_a_time_that_is_no_time_falls_back(paths: Paths) -> None:
    now = time.time()
    assert logs.parse('{"time": "yesterday"}', "a", now).when == now
    assert logs.parse("[1, 2]", "a", now).fields["message"] == "[1, 2]"


def test_only_samplers_are_told_which_engine_generates(tmp_path: Path) -> None:
    commands = mesh_commands(Paths.of(tmp_path), {"tiny": Path("/models/tiny")}, engine="vllm")
    assert {command.service: command.config.get("engine") for command in commands} == {
        "coordinator": None, "environment": None, "reward": None, "sampler": "vllm", "trainer": None,
    }  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_refused_with_the_way_out() -> None:
    check_engine(SamplerEngine.TORCH)
    with pytest.raises(UserError, match="vLLM is not installed.*make vllm"):
        check_engine(SamplerEngine.VLLM)
