"""Bytes of messages: MessagePack between services, JSON for people, told apart by the `Content-Type` header."""

from __future__ import annotations

import contextlib
import re
from functools import lru_cache
from json import loads
from typing import Any

import msgspec

from shared.contracts import arrays
from shared.errors import UserError

JSON = "application/json"
MSGPACK = "application/msgpack"
CONTENT_TYPE = "Content-Type"

_REQUEST = re.compile(rb'"request_id"\s*:\s*"([A-Za-z0-9._-]+)"')
"""In JSON that is broken elsewhere."""
_MAPS = {bytes([first]) for first in (*range(0x80, 0x90), 0xDE, 0xDF)}
"""How a map begins in MessagePack."""

_json_encoder = msgspec.json.Encoder(enc_hook=arrays.to_list)
_msgpack_encoder = msgspec.msgpack.Encoder(enc_hook=arrays.to_bytes)


def encode(message: Any, *, json: bool) -> bytes:
    """The body for a message."""
    return _json_encoder.encode(message) if json else _msgpack_encoder.encode(message)


def decode(body: bytes, kind: Any, *, json: bool) -> Any:
    """The message in a body. Raise `UserError` that names the field and what is wrong with it."""
    decoder = _decoder(kind, json=json)
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        if not json and body[:1] not in _MAPS:
            raise UserError(
                f"not a valid {_name(kind)}: neither a JSON object nor a MessagePack map, it begins with {body[:20]!r}"
            ) from None
        raise UserError(f"not a valid {_name(kind)}: {error}") from None


def request_in(body: bytes) -> str | None:
    """The `request_id` in a body that need not be of any type, nor even right, so that its sender can be told."""
    found: Any = None
    for decoder in (loads, msgspec.msgpack.decode):  # the first reads NaN too, which a sender may have written
        with contextlib.suppress(ValueError, RecursionError, msgspec.MsgspecError):
            found = decoder(body)
            break
    if isinstance(found, dict):
        request = found.get("request_id")
        return str(request) if isinstance(request, (str, int)) else None
    written = _REQUEST.search(body)
    return written[1].decode() if written else None


def is_json(headers: dict[str, str] | None, body: bytes) -> bool:
    """Whether a body is JSON. Without a header, one that begins like a JSON object is: bare clients often set none."""
    kind = (headers or {}).get(CONTENT_TYPE)
    if kind is not None:
        return kind.split(";")[0].strip().lower() != MSGPACK
    return body[:1] in (b"{", b"[", b" ", b"\n", b"\t")


@lru_cache(maxsize=256)
def _decoder(kind: Any, *, json: bool) -> msgspec.json.Decoder[Any] | msgspec.msgpack.Decoder[Any]:
    make = msgspec.json.Decoder if json else msgspec.msgpack.Decoder
    return make(kind, dec_hook=arrays.decode)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or " or ".join(part.__name__ for part in kind.__args__)
