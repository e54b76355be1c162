"""What was once written decodes for ever, to the same message."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import pytest

from shared import topology, wire
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.training import AnyOperation
from shared.errors import UserError
from tests.contracts.examples import MESSAGES, RECORDS
from tests.contracts.write_golden import GOLDEN


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("suffix", ["msgpack", "json"])
def test_golden_bytes_of_a_message_decode_to_it(name: str, suffix: str) -> None:
    channel, message = MESSAGES[name]
    body = (GOLDEN / f"{name}.{suffix}").read_bytes()
    assert wire.decode(body, channel.type, json=suffix == "json") == message


@pytest.mark.parametrize("name", RECORDS)
def test_golden_bytes_of_a_record_decode_to_it(name: str) -> None:
    bucket, value = RECORDS[name]
    assert wire.decode((GOLDEN / f"record_{name}.json").read_bytes(), bucket.type, json=True) == value


def test_every_channel_every_type_and_every_bucket_has_golden_bytes() -> None:
    covered = {(channel.name, type(message)) for channel, message in MESSAGES.values()}
    travelling = {
        (channel.name, kind)
        for channel in topology.CHANNELS
        for kind in typing.get_args(channel.type) or [channel.type]
    }
    assert covered == travelling
    assert {bucket.name for bucket, _ in RECORDS.values()} == {bucket.name for bucket in topology.BUCKETS}


@pytest.mark.parametrize("kind", dict.fromkeys(type(message) for _, message in MESSAGES.values()))
def test_every_field_is_set_to_something_else_than_its_default_in_an_example(kind: type[msgspec.Struct]) -> None:
    examples = [message for _, message in MESSAGES.values() if type(message) is kind]
    for field in msgspec.structs.fields(kind):
        default = field.default if field.default is not msgspec.NODEFAULT else None
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        assert any(getattr(example, field.name) != default for example in examples), f"{kind.__name__}.{field.name}"


def test_a_field_of_a_newer_writer_is_passed_over() -> None:
    body = b'{"op":"save_policy","run":"r","seq":1,"request_id":"q","version":2,"invented_later":true}'
    assert wire.decode(body, AnyOperation, json=True).version == 2


def test_arrays_are_bytes_in_messagepack_and_lists_in_json() -> None:
    assert wire.encode(Int32s([1, -1]), json=False) == b"\xc4\x08\x01\x00\x00\x00\xff\xff\xff\xff"
    assert wire.encode(Float32s([0.5, float("nan")]), json=True) == b"[0.5,null]"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b'{"request_id":"r","base_model":"m","prompt":[1,2.5]}', "not Int32s"),
        (b'{"request_id":"r","base_model":"m","prompt":[4294967296]}', "not Int32s"),
        (b'{"request_id":"r","base_model":"m","prompt":"abc"}', "Expected `array`"),
        (b'{"request_id":"r","base_model":"m","prompt":[1],"num_samples":0}', "num_samples"),
        (b'{"request_id":"r"', "truncated"),
    ],
)
def test_bad_json_is_refused_with_the_field_named(body: bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        wire.decode(body, topology.SAMPLES.type, json=True)


def test_truncated_array_bytes_are_refused() -> None:
    body = msgspec.msgpack.encode({"request_id": "r", "base_model": "m", "prompt": b"\x01\x02\x03"})
    with pytest.raises(UserError, match="3 bytes are not a whole number"):
        wire.decode(body, topology.SAMPLES.type, json=False)


@pytest.mark.parametrize(
    ("headers", "body", "json"),
    [
        ({"Content-Type": "application/json"}, b"x", True),
        ({"Content-Type": "application/json; charset=utf-8"}, b"x", True),
        ({"Content-Type": "application/msgpack"}, b"{", False),
        (None, b'{"a":1}', True),
        ({}, b"\x81\xa1a\x01", False),
    ],
)
def test_json_is_told_from_messagepack(headers: dict[str, str] | None, body: bytes, json: Any) -> None:
    assert wire.is_json(headers, body) is json
