"""Uvicorn inside the service's own loop, with the patience that a server on an open port must not have."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.config import GatewayConfig
from shared.errors import UserError

KEEP_ALIVE_SECONDS = 120
"""Longer than clients keep idle connections, so that they close them, not we while they send."""
BACKLOG = 4096


class HttpServer:
    """Serves an application until it is told to stop."""

    def __init__(self, app: Any, config: GatewayConfig) -> None:
        settings = uvicorn.Config(
            app,
            http=_protocol(config.head_seconds),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, int(config.drain_seconds)),
            limit_concurrency=config.max_connections,
            backlog=BACKLOG,
        )
        self._server = _Server(settings)
        self._socket = _bound(config.host, config.port)
        self.port: int = self._socket.getsockname()[1]

    async def serve(self) -> None:
        """Take connections until `stop`."""
        _allow_files()
        await self._server.serve(sockets=[self._socket])

    async def started(self) -> None:
        """Return once connections are taken."""
        await self._server.taking.wait()

    def stop(self) -> None:
        """Take no more connections; finish the requests that are being answered."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.taking = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.taking.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's, not the server's."""
        yield


def _protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, which closes a connection on which the head of a request does not come in time."""

    class Protocol(HttpToolsProtocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._late = self.loop.call_later(head_seconds, self._close)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._late is None:
                self._late = self.loop.call_later(head_seconds, self._close)

        def on_headers_complete(self) -> None:
            self._disarm()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _disarm(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _close(self) -> None:
            self._late = None
            self.transport.close()

    return Protocol


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise UserError(f"port {port} on {host} cannot be used ({error.strerror}): set another port") from None
    return listener


def _allow_files() -> None:
    """As many connections as the system allows: a shell's usual limit is lower than what one client opens."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
