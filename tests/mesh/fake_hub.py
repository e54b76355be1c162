"""A model hub that takes what is pushed to it, on the loopback."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncIterator

from aiohttp import web


class FakeHub:
    """Knows one user, and keeps the files of every repository."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.url = ""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeHub]:
        """Answer until the end of the block."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/api/whoami-v2", self._whoami)
        app.router.add_post("/api/repos/create", self._create)
        app.router.add_post("/api/validate-yaml", self._validate)
        app.router.add_post("/api/models/{user}/{name}/preupload/{revision}", self._preupload)
        app.router.add_post("/api/models/{user}/{name}/commit/{revision}", self._commit)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _whoami(self, _: web.Request) -> web.Response:
        return web.json_response({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})

    async def _create(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.private[name] = bool(asked.get("private", asked.get("visibility") == "private"))
        return web.json_response({"url": f"{self.url}/{name}", "name": name, "id": name})

    async def _validate(self, _: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def _preupload(self, request: web.Request) -> web.Response:
        asked = await request.json()
        files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked["files"]]
        return web.json_response({"files": files})

    async def _commit(self, request: web.Request) -> web.Response:
        for line in (await request.text()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        place = f"{self.url}/{request.match_info['user']}/{request.match_info['name']}/commit/{'1' * 40}"
        return web.json_response({"commitUrl": place, "commitOid": "1" * 40, "success": True})
