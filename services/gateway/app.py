"""From HTTP to endpoint functions and back. The one place that turns errors into answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.gateway import bodies, errors
from services.gateway.auth import NOBODY
from services.gateway.context import Answer, Call, Endpoint, Gateway
from shared.contracts import arrays
from shared.errors import MeshError, UserError

log = logging.getLogger(__name__)

PREFIX = "/api/v1/"
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_encoder = msgspec.json.Encoder(enc_hook=arrays.to_list)


def make_app(gateway: Gateway, endpoints: Sequence[Endpoint]) -> Starlette:
    """The application. Routes are tried in order: what is asked most often stands first."""
    routes = [
        Route(PREFIX + endpoint.path, Handler(gateway, endpoint), methods=[endpoint.method]) for endpoint in endpoints
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})


class Handler:
    """Answers requests to one endpoint."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self._gateway = gateway
        self._endpoint = endpoint
        self._decoder = None if endpoint.body in (None, bytes) else msgspec.json.Decoder(endpoint.body)
        name = f"{endpoint.method} {endpoint.path}"
        self._seconds = gateway.metrics.seconds.labels(name)
        self._in_progress = gateway.metrics.in_progress.labels(name)
        self._name = name

    async def __call__(self, scope: MutableMapping[str, Any], receive: bodies.Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        started = time.perf_counter()
        self._in_progress.inc()
        status = 499
        try:
            answer = await self._answer(scope, receive)
            status = answer.status
            await _send(send, answer)
        except bodies.Disconnected:
            pass
        finally:
            self._in_progress.dec()
            self._seconds.observe(time.perf_counter() - started)
            self._gateway.metrics.requests.labels(self._name, status).inc()

    async def _answer(self, scope: MutableMapping[str, Any], receive: bodies.Receive) -> Answer:
        try:
            found = await self._endpoint.handle(self._gateway, await self._call(scope, receive))
        except bodies.Disconnected:
            raise
        except Exception as error:  # whatever it is, the client is told, and the next request finds us well
            return refusal(error)
        return found if isinstance(found, Answer) else Answer(_encoder.encode(found))

    async def _call(self, scope: MutableMapping[str, Any], receive: bodies.Receive) -> Call:
        headers = dict(scope["headers"])
        caller = NOBODY if self._endpoint.public else self._gateway.callers.caller(headers)
        body: Any = None
        if self._endpoint.body is not None:
            config = self._gateway.config
            body = await bodies.read(receive, headers, config.max_body_bytes, config.body_seconds)
            if self._decoder is not None:
                body = _decoded(self._decoder, body)
        return Call(caller, body, scope["path_params"], scope, headers)


def refusal(error: Exception) -> Answer:
    """What a client is told of an error."""
    status = errors.status_of(error)
    known = isinstance(error, MeshError)
    if not known:
        log.error("a request failed: %s", error, exc_info=error)
    text = str(error) if known else "the gateway failed; its log says why"
    category = "user" if isinstance(error, UserError) else "server"
    body = _encoder.encode({"error": text, "category": category, "detail": text})
    return Answer(body, status=status, headers=errors.headers_of(error))


def _decoded(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the body is not what is expected: {error}") from None


async def _send(send: Send, answer: Answer) -> None:
    headers = {name.lower(): value for name, value in (answer.headers or {}).items()}
    if answer.status != 204:
        headers.setdefault("content-type", answer.media_type)
        if answer.chunks is None:
            headers["content-length"] = str(len(answer.content))
    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": listed})
    if answer.chunks is not None:
        # Whatever fails from here on cannot be told any more: the server cuts the connection, and logs why.
        await send({"type": "http.response.body", "body": answer.content, "more_body": True})
        async for chunk in answer.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"" if answer.chunks else answer.content})


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = f"{request.method} {request.url.path} is not an endpoint of this gateway"
    body = _encoder.encode({"error": text, "category": "user", "detail": text})
    return Response(body, status, media_type="application/json")
