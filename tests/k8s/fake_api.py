"""A small API server over HTTP: what `services/autoscaler/kubernetes` needs of one, as the real one does it.

Objects have uid and resourceVersion; 409 answers stale updates, names that are taken and preconditions that do not
hold; 422 what Kubernetes' own schemas refuse; watches have bookmarks, end when asked to, and answer 410 to a version
that is forgotten. It can be down, throttle, or fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.k8s.fake_store import KINDS, Kind, Object, Refused, Store

VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class FakeApi:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.store = Store()
        self.down = False
        self.throttled: int | None = None
        """Seconds that everybody is asked to wait."""
        self.failing = False
        """Answers 500."""
        self.silent = False
        """Takes requests and says nothing."""
        self.refusing: Callable[[str, Kind, str], Refused | None] = lambda verb, kind, name: None
        self.bookmark_seconds = 0.2
        self.asked: list[tuple[str, Kind, str]] = []
        """Verb, kind and name of each request that arrived, whatever the answer."""
        self._open: set[web.StreamResponse] = set()
        self._hang_up = asyncio.Event()

    async def serve(self) -> TestServer:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        server = TestServer(app, host="127.0.0.1")
        await server.start_server()
        return server

    def go_down(self) -> None:
        """Answer nobody, and break off what is being watched."""
        self.down = True
        self.break_off()

    def break_off(self) -> None:
        self._hang_up.set()
        self._hang_up = asyncio.Event()

    def verbs(self) -> dict[str, set[str]]:
        """What was asked for, by resource: what RBAC has to allow."""
        used: dict[str, set[str]] = {}
        for verb, kind, _ in self.asked:
            used.setdefault(kind[1], set()).add(verb)
        return used

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.down:
            assert request.transport is not None
            request.transport.abort()
            raise web.HTTPServiceUnavailable
        kind, namespace, name = _parts(request.path)
        watching = request.query.get("watch") == "true"
        verb = VERBS.get(request.method, "watch" if watching else "get" if name else "list")
        self.asked.append((verb, kind, name))
        if self.silent:
            await self._hang_up.wait()
        if self.throttled is not None:
            refused = Refused(429, "TooManyRequests", "too many requests, please try again later")
            return _status(refused, {"Retry-After": str(self.throttled)})
        if self.failing:
            return _status(Refused(500, "InternalError", "etcdserver: leader changed"))
        try:
            if (refusal := self.refusing(verb, kind, name)) is not None:
                raise refusal
            if watching:
                return await self._watch(request, kind)
            body = await request.json() if request.can_read_body else {}
            return await self._plain(verb, request, kind, namespace, name, body)
        except Refused as error:
            return _status(error)

    async def _plain(
        self, verb: str, request: web.Request, kind: Kind, namespace: str | None, name: str, body: Object
    ) -> web.Response:
        store = self.store
        if verb == "list":
            return self._list(request, kind)
        done: Mapping[str, Callable[[], Awaitable[Object]]] = {
            "create": lambda: store.create(kind, body, namespace),
            "update": lambda: store.replace(kind, name, body),
            "patch": lambda: store.patch(kind, name, body),
            "delete": lambda: store.delete(kind, name, body),
        }
        found = store.get(kind, name) if verb == "get" else await done[verb]()
        return web.json_response(found, status=201 if verb == "create" else 200)

    def _list(self, request: web.Request, kind: Kind) -> web.Response:
        found = [one for one in self.store.all(kind) if _selected(one, request.query)]
        first, limit = int(request.query.get("continue", 0)), int(request.query.get("limit", 0)) or len(found)
        page = [{k: v for k, v in one.items() if k not in ("apiVersion", "kind")} for one in found]
        metadata = {"resourceVersion": str(self.store.version)}
        if first + limit < len(page):
            metadata["continue"] = str(first + limit)
        items = page[first : first + limit]
        return web.json_response(
            {"apiVersion": kind[0], "kind": f"{KINDS[kind]}List", "metadata": metadata, "items": items}
        )

    async def _watch(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):  # whoever watched has gone
            await self._events(request, response, kind)
        return response

    async def _events(self, request: web.Request, response: web.StreamResponse, kind: Kind) -> None:
        version, hang_up = int(request.query["resourceVersion"]), self._hang_up
        bookmarks = request.query.get("allowWatchBookmarks") == "true"
        ends = asyncio.get_running_loop().time() + float(request.query.get("timeoutSeconds", 300))
        while (left := ends - asyncio.get_running_loop().time()) > 0 and not hang_up.is_set():
            if version < self.store.forgotten:
                gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                await _send(response, "ERROR", gone)
                break
            for at, what, body in list(self.store.since(kind, version)):
                version = at
                if _selected(body, request.query):
                    await _send(response, what, body)
            quiet = not await self._something(min(left, self.bookmark_seconds), hang_up)
            if quiet and bookmarks and not any(self.store.since(kind, version)):
                version = max(version, self.store.version)
                empty = {"apiVersion": kind[0], "kind": KINDS[kind], "metadata": {"resourceVersion": str(version)}}
                await _send(response, "BOOKMARK", empty)
        if hang_up.is_set() and request.transport is not None:
            request.transport.abort()

    async def _something(self, seconds: float, hang_up: asyncio.Event) -> bool:
        async def change() -> None:
            async with self.store.changed:
                await self.store.changed.wait()

        waits = [asyncio.ensure_future(change()), asyncio.ensure_future(hang_up.wait())]
        done, pending = await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for one in pending:
            one.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return bool(done)


def _parts(path: str) -> tuple[Kind, str | None, str]:
    parts = path.strip("/").split("/")
    version, rest = (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
    namespace = None
    if rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    return (version, rest[0]), namespace, rest[1] if len(rest) > 1 else ""


def _selected(found: Object, query: Mapping[str, str]) -> bool:
    labels = found["metadata"].get("labels") or {}
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = part.partition("=")
        if labels.get(key) != value:
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = part.partition("=")
        target: Any = found
        for step in key.split("."):
            target = (target or {}).get(step)
        if target != value:
            return False
    return True


async def _send(response: web.StreamResponse, what: str, body: Object) -> None:
    await response.write(json.dumps({"type": what, "object": body}).encode() + b"\n")


def _status(error: Refused, headers: Mapping[str, str] | None = None) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": error.reason, "message": str(error),
            "code": error.status}  # fmt: skip
    return web.json_response(body, status=error.status, headers=headers)
