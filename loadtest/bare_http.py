"""HTTP/1.1 as lightly as a client can: one connection, one request at a time, answers with a Content-Length."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import cast

END = b"\r\n\r\n"
LENGTH = b"content-length: "


class Connection(asyncio.Protocol):
    """A connection that is kept."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    async def post(self, request: bytes) -> tuple[int, bytes]:
        """Send a whole request (see `request`); status and body of its answer."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._buffer += data
        head = self._buffer.find(END)
        if head < 0:
            return
        place = self._buffer.find(LENGTH, 0, head)
        length = 0 if place < 0 else int(self._buffer[place + len(LENGTH) : self._buffer.find(b"\r", place)])
        end = head + len(END) + length
        if len(self._buffer) < end or self._answer is None:
            return
        status, body = int(self._buffer[9:12]), bytes(self._buffer[head + len(END) : end])
        del self._buffer[:end]
        if not self._answer.done():
            self._answer.set_result((status, body))

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the gateway has hung up"))


def request(path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A whole POST request."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: gateway\r\n{lines}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
