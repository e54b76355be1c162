"""Bytes of messages: MessagePack between services, JSON for people, told apart by the `Content-Type` header."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from shared.contracts import arrays
from shared.errors import UserError

JSON = "application/json"
MSGPACK = "application/msgpack"
CONTENT_TYPE = "Content-Type"

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
        raise UserError(f"not a valid {_name(kind)}: {error}") from None


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
