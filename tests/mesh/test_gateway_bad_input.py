"""Whatever comes over HTTP, it is answered with what is wrong, and the next request is answered well."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import zstandard
from tinker.proto import tinker_public_pb2 as proto

from shared import topology
from shared.bus import Bus
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AnyOperation, ForwardBackward, Refused, RunRecord
from tests.mesh.gateways import KEY, Asker, add_key, http, new_session, poll
from tests.mesh.harness import MODEL, Place

PROTOBUF = {"Content-Type": "application/x-protobuf"}
MOST = 1 << 20


@contextlib.asynccontextmanager
async def client_of(place: Place, bus: Bus, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    await add_key(bus)
    async with place.gateway(max_body_bytes=MOST, **settings) as gateway, http(gateway.port) as client:
        yield client
        assert (await client.get("healthz")).json() == {"status": "ok"}, "the gateway is well afterwards"


async def new_run(client: httpx.AsyncClient, bus: Bus) -> str:
    """A run without a trainer: what is submitted stays in its log, to be looked at."""
    session = await new_session(client)
    run = f"{session}:train:0"
    await bus.table(topology.RUNS).put(run, RunRecord(run=run, base_model=MODEL, lora=LoraSpec(), session=session))
    return run


async def logged(bus: Bus, run: str) -> list[AnyOperation]:
    """What has been submitted for a run, by now."""
    last = await bus.last_place(topology.OPERATIONS, run=run)
    assert last, "something has been submitted"
    operations: list[AnyOperation] = []
    async for delivery in bus.follow(topology.OPERATIONS, run=run):
        operations.append(delivery.message)
        if delivery.seq == last:
            break
    return operations


def training(run: str, seq: int = 1, **changes: Any) -> proto.ForwardBackwardRequest:
    message = proto.ForwardBackwardRequest(model_id=run, seq_id=seq, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([5, 6, 7], "<i4").tobytes()
    put(datum, "target_tokens", [6, 7, 8], "<i8")
    put(datum, "weights", [1.0, 1.0, 1.0], "<f4")
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def put(datum: Any, name: str, values: Any, dtype: str, shape: list[int] | None = None) -> None:
    tensor = datum.loss_fn_inputs[name]
    array = np.array(values, dtype)
    tensor.dense = array.tobytes()
    tensor.dtype = {"<i8": proto.DTYPE_INT64, "<f4": proto.DTYPE_FLOAT32}[dtype]
    tensor.ClearField("shape")
    tensor.shape.extend(array.shape if shape is None else shape)


def is_told(answer: httpx.Response, status: int, text: str) -> None:
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"], answer.text
    assert answer.json()["detail"] == answer.json()["error"]


# -- what cannot even be attributed ----------------------------------------------------------------------------------


BAD_BODIES: list[tuple[str, bytes, str]] = [
    ("optim_step", b"", "truncated"),
    ("optim_step", b"[1, 2", "Expected `object`"),
    ("optim_step", b'{"model_id": 5, "seq_id": 1}', "Expected `str`"),
    ("optim_step", b'{"model_id": "x", "seq_id": 1e400}', "out of range"),
    ("optim_step", b'{"model_id": "x", "seq_id": NaN}', "malformed"),
    ("optim_step", b'{"model_id": "\xff", "seq_id": 1}', "what is expected"),
    ("create_session", b'{"tags": [], "sdk_version": "1", "surprise": 1}', "surprise"),
    ("create_session", b'{"tags": "no list", "sdk_version": "1"}', "Expected `array`"),
    ("create_session", b"[" * 100_000, "what is expected"),
    ("retrieve_future", b'{"request_id": null}', "Expected `str`"),
    ("forward_backward", b"\xff\xff\xff\xff", "no valid protobuf"),
    ("create_custom_loss", b"{}", "run them in the client"),
]


async def test_a_body_that_is_not_what_it_should_be_is_refused(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        for path, body, text in BAD_BODIES:
            is_told(await client.post(path, content=body), 400, text)


NO_IDS = (
    "", "x", "../../etc/passwd", "s-1.train-0.1", "s-1.sample-0.1/0", "s-1.train-*.>", "s-1.train-0.-1",
    "s-\u0661:train:1",
)  # fmt: skip


async def test_an_id_that_is_none_is_not_found(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        for text in NO_IDS:
            assert (await poll(client, text)).status_code == 404
            assert (await client.post("get_info", json={"model_id": text})).status_code == 404
            assert (await client.post("session_heartbeat", json={"session_id": text})).status_code == 404


async def test_compressed_bodies_are_read_and_damaged_ones_refused(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        run = await new_run(client, bus)
        packed = zstandard.compress(training(run).SerializeToString())
        headers = {**PROTOBUF, "Content-Encoding": "zstd"}
        assert (await client.post("forward_backward", content=packed, headers=headers)).status_code == 200
        assert isinstance((await logged(bus, run))[0], ForwardBackward)
        bomb = zstandard.compress(bytes(1 << 30))
        assert len(bomb) < MOST
        for body, status, text in (
            (packed[:-5], 400, "cut off"),
            (packed[5:], 400, "not valid zstd"),
            (b"", 400, "cut off"),
            (bomb, 413, "max_body_bytes"),
        ):
            is_told(await client.post("forward_backward", content=body, headers=headers), status, text)
        other = {**PROTOBUF, "Content-Encoding": "br"}
        is_told(await client.post("forward_backward", content=packed, headers=other), 400, "zstd")


async def test_a_body_over_the_limit_is_refused_whether_announced_or_not(place: Place, bus: Bus) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(MOST // 1000 + 100):
            yield bytes(1000)

    async with client_of(place, bus) as client:
        is_told(await client.post("optim_step", content=bytes(MOST + 1)), 413, "max_body_bytes")
        is_told(await client.post("optim_step", content=pieces()), 413, "max_body_bytes")


BAD_KEYS: list[tuple[dict[str, str], str]] = [
    ({}, "no API key"),
    ({"X-API-Key": "tml-unknown"}, "not known"),
    ({"X-API-Key": ""}, "no API key"),
    ({"X-API-Key": "eyJhbGciOiJub25lIn0.eyJrZXkiOiJ4In0."}, "exchange the API key"),
    ({"Authorization": "Basic dTpw"}, "no API key"),
    ({"X-API-Key": "\xff\xfe"}, "not known"),
]


async def test_a_request_without_a_good_key_is_refused(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        for headers, text in BAD_KEYS:
            bare = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            async with httpx.AsyncClient(headers=bare) as other:
                is_told(await other.get(f"{client.base_url}get_server_capabilities"), 401, text)


async def test_a_key_that_has_expired_is_refused(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        await add_key(bus, "tml-old", expires=1.0)
        answer = await client.get("get_server_capabilities", headers={"X-API-Key": "tml-old"})
        assert answer.status_code == 401


async def test_a_path_that_is_none_is_not_found(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        for path in ("", "nonsense", "../healthz", "%2e%2e/%2e%2e/etc/passwd", "sessions/x/finish/more"):
            answer = await client.post(f"{client.base_url}{path}")
            assert answer.status_code in (404, 405)
            assert "is not an endpoint" in answer.json()["error"]


# -- what is refused in its place in a run's log ----------------------------------------------------------------------

Change = Callable[[proto.ForwardBackwardRequest], object]


def _sparse(message: proto.ForwardBackwardRequest) -> None:
    tensor = message.data[0].loss_fn_inputs["target_tokens"]
    tensor.ClearField("shape")
    tensor.shape.extend([3, 2])
    tensor.sparse_csr.values = np.array([6, 7], "<i8").tobytes()
    tensor.sparse_csr.crow_indices = np.array([0, 1, 9, 2], "<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array([0, 1], "<i8").tobytes()


BAD_TRAINING: list[tuple[Change, str]] = [
    (lambda m: m.ClearField("data"), "no data"),
    (lambda m: m.data[0].ClearField("model_input"), "datum 0 has no tokens"),
    (lambda m: setattr(m, "loss_fn", "hinge"), "'hinge' is unknown: choose one of cross_entropy"),
    (lambda m: setattr(m, "loss_fn", "custom"), "forward_backward_custom"),
    (lambda m: m.loss_fn_config.update(beta=1.0), "cross_entropy has no parameters"),
    (lambda m: setattr(m.loss_fn_config_v2["x"], "text", "y"), "it must be a number"),
    (lambda m: put(m.data[0], "target_tokens", [6, 7], "<i8"), "datum 0 has 2 target_tokens for 3 tokens"),
    (lambda m: put(m.data[0], "target_tokens", [6, -7, 8], "<i8"), "datum 0: target_tokens[1] is -7"),
    (lambda m: put(m.data[0], "target_tokens", [6, 2**40, 8], "<i8"), "datum 0: target_tokens[1] is 1099511627776"),
    (lambda m: put(m.data[0], "target_tokens", [1.0, 2.0, 3.0], "<f4"), "send them as int64"),
    (lambda m: put(m.data[0], "target_tokens", [1, 2, 3], "<i8", [2**40, 2**40]), "it may have"),
    (lambda m: put(m.data[0], "target_tokens", [1, 2, 3], "<i8", [3, 0]), "3 values and the shape [3, 0]"),
    (lambda m: put(m.data[0], "target_tokens", [1, 2, 3], "<i8", [1, 1, 3]), "give N, or N rows of K"),
    (lambda m: put(m.data[0], "weights", [1.0, float("nan"), 1.0], "<f4"), "datum 0: weights[1] is nan"),
    (lambda m: put(m.data[0], "weights", [1.0], "<f4"), "datum 0: weights has the shape [1]"),
    (lambda m: put(m.data[0], "colour", [1.0], "<f4"), "loss input 'colour' is unknown"),
    (lambda m: setattr(m.data[0].loss_fn_inputs["weights"], "dtype", 0), "no known dtype"),
    (lambda m: setattr(m.data[0].loss_fn_inputs["weights"], "dense", b"abc"), "no whole number of 4-byte values"),
    (lambda m: setattr(m.data[0].model_input[0].encoded_text, "tokens", b"abc"), "3 bytes are not a whole number"),
    (lambda m: setattr(m.data[0].model_input.add().image, "data", b"png"), "datum 0: model_input: chunk 1 is an image"),
    (lambda m: setattr(m.data[0].model_input.add().dmel, "dmel", b"mel"), "chunk 1 is audio"),
    (_sparse, "crow_indices must be 4 places that rise from 0 to 2"),
    (lambda m: setattr(m, "loss_fn", "stable_reinforce"), "where its tokens come from"),
]


async def test_training_data_that_are_wrong_use_up_their_seq_and_say_why(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        run = await new_run(client, bus)
        for seq, (change, _) in enumerate(BAD_TRAINING, 1):
            message = training(run, seq)
            change(message)
            answer = await client.post("forward_backward", content=message.SerializeToString(), headers=PROTOBUF)
            assert answer.status_code == 200, answer.text
        for operation, (_, text) in zip(await logged(bus, run), BAD_TRAINING, strict=True):
            assert isinstance(operation, Refused), text
            assert text in operation.failure.message
            assert operation.failure.kind == "user"


BAD_OPERATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("optim_step", {}, "adam_params is missing"),
    ("optim_step", {"adam_params": {"learning_rate": -1}}, "learning_rate"),
    ("optim_step", {"adam_params": {"momentum": 1}}, "momentum"),
    ("optim_step", {"optimizer_params": {"type": "dimuon", "learning_rate": 1}}, "'dimuon' is not available"),
    ("save_weights", {"path": "../../etc/passwd"}, "no name of a checkpoint"),
    ("save_weights", {"path": "a/b"}, "no name of a checkpoint"),
    ("save_weights", {"path": ".hidden"}, "no name of a checkpoint"),
    ("save_weights", {"path": "x" * 128}, "no name of a checkpoint"),
    ("save_weights", {"path": "x", "ttl_seconds": 5}, "ttl_seconds is 5"),
    ("save_weights_for_sampler", {}, "sampling_session_seq_id"),
    ("save_weights_for_sampler", {"path": ""}, "no name of a checkpoint"),
    ("save_weights_for_sampler", {"sampling_session_seq_id": -1}, "sampling_session_seq_id"),
    ("save_weights_for_sampler", {"sampling_session_seq_id": 0, "kind": "live"}, "live"),
    ("save_weights_external", {"path": "x", "age_encryption_recipients": ["age1"] * 11}, "give 10 at most"),
    ("load_weights", {"path": "tinker://../../etc/weights/passwd", "optimizer": True}, "no checkpoint"),
    ("load_weights", {"path": "file:///etc/passwd", "optimizer": True}, "no path of a checkpoint"),
    ("load_weights", {"path": "tinker://r/weights/../../x", "optimizer": True}, "no name of a checkpoint"),
    ("load_weights", {"path": "tinker://r/weights/x", "optimizer": True}, "there is no checkpoint"),
    ("load_weights", {"path": "tinker://r/sampler_weights/x", "optimizer": True}, "not to train"),
]


async def test_operations_that_are_wrong_use_up_their_seq_and_say_why(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        run = await new_run(client, bus)
        for seq, (path, body, _) in enumerate(BAD_OPERATIONS, 1):
            answer = await client.post(path, json={"model_id": run, "seq_id": seq, **body})
            assert answer.status_code == 200, answer.text
        for operation, (_, _, text) in zip(await logged(bus, run), BAD_OPERATIONS, strict=True):
            assert isinstance(operation, Refused), text
            assert text in operation.failure.message


async def test_a_place_that_no_operation_can_have_is_refused(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        run = await new_run(client, bus)
        for seq in (0, -1, 2**31):
            body = {"model_id": run, "seq_id": seq, "adam_params": {}}
            is_told(await client.post("optim_step", json=body), 400, f"seq_id {seq}")


BAD_RUNS: list[tuple[dict[str, Any], str]] = [
    ({"base_model": "unknown/model"}, "'unknown/model' is not served here"),
    ({"base_model": "../../etc"}, "is not served here"),
    ({"lora_config": None}, "lora_config is missing"),
    ({"lora_config": {"rank": 0}}, "rank is 0"),
    ({"lora_config": {"rank": 100_000}}, "rank is 100000"),
    ({"lora_config": {"rank": 8, "seed": 2**70}}, "does not fit into 64 bits"),
    ({"lora_config": {"rank": 8, "train_attn": False, "train_mlp": False, "train_unembed": False}}, "to train"),
    ({"optimizer_config": {"type": "dimuon", "version": 1}}, "'dimuon' is not available"),
    ({"model_seq_id": -1}, "model_seq_id -1"),
]


async def test_a_run_that_cannot_be_begun_is_refused(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        await Asker.connect(client, bus)
        session = await new_session(client)
        good = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 8}}
        for change, text in BAD_RUNS:
            body = {name: value for name, value in {**good, **change}.items() if value is not None}
            is_told(await client.post("create_model", json=body), 400, text)


BAD_SAMPLES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": {"chunks": []}}, "prompt is empty"),
    ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [-1]}]}}, "token id -1"),
    ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [2**40]}]}}, "outside of 32 bits"),
    ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "chunk 0 is an image"),
    ({"prompt": {"chunks": [{"type": "dmel", "dmel": ""}]}}, "chunk 0 is audio"),
    ({"prompt": {"chunks": [{"type": "smell"}]}}, "smell"),
    ({"num_samples": 0}, "num_samples is 0"),
    ({"num_samples": 10**9}, "num_samples is 1000000000"),
    ({"seq_id": -1}, "seq_id -1"),
    ({"seq_id": 2**63}, "seq_id 9223372036854775808"),
    ({"sampling_params": {"temperature": -1}}, "temperature"),
    ({"sampling_params": {"top_p": 2}}, "top_p"),
    ({"sampling_params": {"max_tokens": -1}}, "max_tokens"),
    ({"sampling_params": {"seed": 2**65}}, "seed"),
    ({"topk_prompt_logprobs": 10**6}, "topk_prompt_logprobs is 1000000"),
    ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k is not available"),
    ({"prompt_logprobs": True, "prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n is 2"),
    ({"prompt_logprobs_last_n": 1}, "goes with prompt_logprobs"),
    ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [2, 1]}}, "shape [1, K]"),
    ({"target_prompt_logprobs": {"data": [1.5], "dtype": "int64", "shape": [1, 1]}}, "whole token ids"),
    ({"target_prompt_logprobs": {"data": [-1], "dtype": "int64", "shape": [1, 1]}}, "names no token"),
]


async def test_a_request_for_samples_that_is_wrong_is_refused(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        asker = await Asker.connect(client, bus)
        for change, text in BAD_SAMPLES:
            is_told(await asker.submit(**{"seq": 1, **change}), 400, text)


BAD_SAMPLERS: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "give base_model or model_path"),
    ({"base_model": "x"}, 400, "'x' is not served here"),
    ({"model_path": "/etc/passwd"}, 400, "no path of a checkpoint"),
    ({"model_path": "tinker://x/weights/y"}, 400, "not made to be sampled"),
    ({"model_path": "tinker://x/sampler_weights/y"}, 404, "there is no checkpoint"),
]


async def test_a_sampler_of_nothing_is_refused(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        session = await new_session(client)
        for change, status, text in BAD_SAMPLERS:
            body = {"session_id": session, "sampling_session_seq_id": 0, **change}
            is_told(await client.post("create_sampling_session", json=body), status, text)


# -- connections ------------------------------------------------------------------------------------------------------


async def ends(reader: asyncio.StreamReader) -> bytes:
    """What comes until the other side hangs up."""
    async with asyncio.timeout(30):
        return await reader.read()


async def test_connections_that_never_finish_a_request_are_closed(place: Place, bus: Bus) -> None:
    async with client_of(place, bus, head_seconds=0.3, body_seconds=0.3) as client:
        port = client.base_url.port
        body = json.dumps({"session_id": "x"}).encode()
        beginnings = [
            b"",
            b"POST /api/v1/session_heart",
            b"POST /api/v1/session_heartbeat HTTP/1.1\r\nX-API-Key: " + KEY.encode() + b"\r\nX-Slow: ",
        ]
        for beginning in beginnings:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(beginning)
            assert await ends(reader) == b""
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /api/v1/session_heartbeat HTTP/1.1\r\nX-API-Key: {KEY}\r\nContent-Length: {len(body) + 9}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        assert answer.startswith(b"HTTP/1.1 408"), "a client that sends no more of its body is told"
        writer.close()
        assert (await client.get("healthz")).status_code == 200


async def test_what_is_no_http_is_answered_and_closed(place: Place, bus: Bus) -> None:
    async with client_of(place, bus) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"\x16\x03\x01\x02\x00 this is no HTTP\r\n\r\n")
        assert (await ends(reader)).startswith(b"HTTP/1.1 400")
        writer.close()


async def test_a_client_that_hangs_up_while_it_waits_harms_nobody(place: Place, bus: Bus) -> None:
    async with client_of(place, bus, poll_seconds=0.5) as client:
        asker = await Asker.connect(client, bus)
        request = await asker.request(1)
        waiting = asyncio.create_task(poll(client, request))
        await asyncio.sleep(0.1)
        waiting.cancel()
        assert (await poll(client, request)).json()["type"] == "try_again"
