"""Names, configuration, blobs, tasks: what every service stands on."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import config, observe, topology
from shared.blobs import BlobStore
from shared.config import ServiceConfig
from shared.contracts.policies import PolicyRef
from shared.errors import PermanentError, UserError, failure_of
from shared.tasks import Tasks


class ExampleConfig(ServiceConfig, frozen=True, kw_only=True):
    size: int = 3
    models: dict[str, str] = {}


@given(st.text(min_size=1, max_size=50).filter(lambda text: text.isprintable()), st.text(min_size=1, max_size=50))
def test_tokens_are_safe_reversible_and_distinct(one: str, other: str) -> None:
    encoded = topology.token(one)
    assert set(encoded) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-=")
    assert topology.untoken(encoded) == one
    assert (encoded == topology.token(other)) == (one == other)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a.b", "a b", "*", ">", "session:train:0", "org/model"])
def test_no_name_widens_a_subject_or_leaves_a_directory(name: str) -> None:
    subject = topology.OPERATIONS.subject(run=name)
    assert subject.count(".") == topology.OPERATIONS.template.count(".")
    assert not set("*> /:") & set(subject)


@pytest.mark.parametrize("name", ["", "x" * 201])
def test_empty_and_endless_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        topology.token(name)


def test_every_subject_belongs_to_exactly_its_stream() -> None:
    for channel in topology.CHANNELS:
        parts = dict.fromkeys(("run", "pool", "environment", "reward", "job", "request", "stream", "owner"), "x")
        owners = [
            stream for stream in topology.STREAMS for pattern in stream.subjects if matches(pattern, channel, parts)
        ]
        assert owners == [channel.stream]


def matches(pattern: str, channel: topology.Channel[object], parts: dict[str, str]) -> bool:
    subject = channel.template.format(**parts)
    wanted, given_parts = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return given_parts[: len(wanted) - 1] == wanted[:-1]
    return len(wanted) == len(given_parts) and all(w in ("*", g) for w, g in zip(wanted, given_parts, strict=True))


def test_configuration_comes_from_file_and_environment_which_goes_first(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('size = 5\nreplica = "one"\n')
    environ = {"OPENRL_EXAMPLE_SIZE": "7", "OPENRL_EXAMPLE_MODELS": '{"a": "/b"}', "OTHER": "x"}
    loaded = config.load(ExampleConfig, "example", file, environ)
    assert (loaded.size, loaded.replica, loaded.models) == (7, "one", {"a": "/b"})


@pytest.mark.parametrize(
    ("text", "environ", "complaint"),
    [
        ("sise = 5", {}, "unknown field `sise`"),
        ("size = [1]", {}, "size"),
        ("size = ", {}, "not valid TOML"),
        ("", {"OPENRL_EXAMPLE_SISE": "1"}, "OPENRL_EXAMPLE_SISE is unknown"),
        ("", {"OPENRL_EXAMPLE_SIZE": "many"}, "Expected `int`"),
    ],
)
def test_configuration_errors_name_the_key(tmp_path: Path, text: str, environ: dict[str, str], complaint: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=complaint):
        config.load(ExampleConfig, "example", file, environ)


def test_a_missing_configuration_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing.toml cannot be read"):
        config.load(ExampleConfig, "example", tmp_path / "nothing.toml", {})


async def test_blobs_are_read_back_and_written_once(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path / "blobs"))
    ref = await store.put("a/b.bin", b"weights")
    assert await store.get(ref) == b"weights"
    assert await store.put("a/b.bin", b"weights") == ref
    with pytest.raises(PermanentError, match="checksum differs"):
        await store.put("a/b.bin", b"other weights")
    assert await store.get(ref) == b"weights"


async def test_a_corrupted_or_missing_blob_is_an_error(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path))
    ref = await store.put("a.bin", b"weights")
    (tmp_path / "a.bin").write_bytes(b"weightz")
    with pytest.raises(PermanentError, match="checksum differs"):
        await store.get(ref)
    await store.delete("a.bin")
    await store.delete("a.bin")
    with pytest.raises(PermanentError, match="is missing"):
        await store.get(ref)


async def test_only_old_blobs_below_the_prefix_are_swept(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path))
    for key in ("messages/old", "messages/new", "policies/old"):
        await store.put(key, b"x")
    for key in ("messages/old", "policies/old"):
        os.utime(tmp_path / key, (0, 0))
    assert await store.sweep("messages/", older_than=60) == 1
    assert {path.name for path in (tmp_path / "messages").iterdir()} == {"new"}
    assert (tmp_path / "policies" / "old").exists()


def test_an_unknown_blob_store_is_refused() -> None:
    with pytest.raises(UserError, match="ftp://example/x"):
        BlobStore("ftp://example/x")


async def test_a_failing_task_is_logged_and_ends_the_wait(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks("test")

    async def fail() -> None:
        raise ZeroDivisionError("oops")

    tasks.start("failing", fail())
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(tasks.wait(), 5)
    assert "task test:failing failed" in caplog.text
    await tasks.stop()


async def test_stopping_cancels_tasks_and_waits_for_them() -> None:
    tasks = Tasks("test")
    ended = asyncio.Event()

    async def sleep() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    tasks.start("sleeping", sleep())
    await asyncio.sleep(0)
    await tasks.stop()
    assert ended.is_set()


def test_a_single_log_line_can_be_given_ids_of_its_own() -> None:
    formatter = observe.JsonFormatter("sampler", "sampler-1")
    policy = PolicyRef(run="job-1", version=3)
    with observe.bound(run="another"):
        line = logging.makeLogRecord({"msg": "it is ready", "run": "job-1", "policy": policy, "other": 1})
        written = json.loads(formatter.format(line))
    assert (written["run"], written["policy"]) == ("job-1", "job-1@3")
    assert "other" not in written


def test_log_lines_are_json_with_the_ids_of_the_work() -> None:
    formatter = observe.JsonFormatter("trainer", "trainer-1")
    record = logging.LogRecord("x", logging.INFO, "f", 1, "hello %s", ("you",), None)
    with observe.bound(job="a-1", run="r"), observe.traced(observe.trace_headers()):
        line = json.loads(formatter.format(record))
    assert line["message"] == "hello you"
    assert (line["service"], line["replica"], line["job"], line["run"]) == ("trainer", "trainer-1", "a-1", "r")
    assert len(line["trace"]) == 32


def test_a_trace_goes_on_over_headers() -> None:
    first = observe.trace_headers()
    with observe.traced(first):
        second = observe.trace_headers()
    assert first["traceparent"].split("-")[1] == second["traceparent"].split("-")[1]


def test_only_user_errors_are_blamed_on_the_user() -> None:
    assert failure_of(UserError("wrong")).kind == "user"
    assert failure_of(KeyError("x")).message == "KeyError: 'x'"
    assert failure_of(KeyError("x")).kind == "server"
