"""The body of a request: read with a limit and a deadline, decompressed, decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import zstandard

from services.gateway.errors import TooLarge
from shared.errors import UserError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Disconnected(Exception):
    """The client has gone before its request was whole: nobody is left to answer."""


async def read(receive: Receive, headers: Mapping[bytes, bytes], most: int, seconds: float) -> bytes:
    """The whole body, decompressed. Raise `UserError` for one that is late or damaged, `TooLarge`, `Disconnected`."""
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > most:
        raise _too_large(int(length), most)
    message = await _next(receive, seconds)
    body = message["body"]
    if message.get("more_body"):
        body = await _rest(receive, bytearray(body), most, seconds)
    if len(body) > most:
        raise _too_large(len(body), most)
    return decompressed(bytes(body), headers.get(b"content-encoding", b"").decode("latin-1"), most)


def decompressed(body: bytes, encoding: str, most: int) -> bytes:
    """Undo a content encoding. Raise `UserError` for one that is unknown or damaged, and `TooLarge`."""
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise UserError(f"content encoding {encoding!r} is not understood: send zstd, or the body as it is")
    decompressor = zstandard.ZstdDecompressor(max_window_size=max(most, 1 << 10)).decompressobj()
    try:
        # Bounded by what comes out, since a few bytes can stand for terabytes.
        found = bytearray()
        for start in range(0, len(body), _STEP):
            found += decompressor.decompress(body[start : start + _STEP])
            if len(found) > most:
                raise _too_large(len(found), most)
    except zstandard.ZstdError as error:
        raise UserError(f"the body is not valid zstd: {error}") from None
    if not decompressor.eof:
        raise UserError("the body is not valid zstd: it is cut off")
    return bytes(found)


_STEP = 4096
"""zstd expands at most some 20,000-fold, so a step gives 80 MB at most before it is looked at."""


async def _next(receive: Receive, seconds: float) -> MutableMapping[str, Any]:
    try:
        async with asyncio.timeout(seconds):
            message = await receive()
    except TimeoutError:
        raise UserError(f"the body of the request did not come within {seconds:g} s") from None
    if message["type"] == "http.disconnect":
        raise Disconnected
    return message


async def _rest(receive: Receive, body: bytearray, most: int, seconds: float) -> bytearray:
    deadline = asyncio.get_running_loop().time() + seconds
    while len(body) <= most:
        message = await _next(receive, deadline - asyncio.get_running_loop().time())
        body += message["body"]
        if not message.get("more_body"):
            break
    return body


def _too_large(size: int, most: int) -> TooLarge:
    return TooLarge(
        f"the body has {size} bytes or more and may have {most}: send fewer tokens at once (max_body_bytes of the "
        "gateway is the limit)"
    )
