"""All objects of one kind, kept up to date: listed once, then watched from where the list was.

A watch that ends is begun anew at the version that was seen last, which bookmarks keep recent; when the API server no
longer has that version (410), everything is listed again. What the API server answers to our own writes is noted at
once, so that a plan never misses what the one before has done.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence

from services.autoscaler.kubernetes.api import GONE, Api, ApiError, Resource
from services.autoscaler.kubernetes.marks import Object, name_of
from shared.errors import TemporaryError

log = logging.getLogger(__name__)

PAGE = 500
LONGEST_PAUSE = 10.0
SHORTEST_WATCH = 0.5
GRACE_SECONDS = 10.0
"""A watch that the API server has not ended so long after it should have is dead."""


class Cache:
    """See the module's docstring."""

    def __init__(
        self, api: Api, resource: Resource, watch_seconds: int, stale_seconds: float, labels: str = ""
    ) -> None:
        self.lists = 0
        """How often everything was listed."""
        self._api, self._resource = api, resource
        self._watch_seconds, self._stale_seconds = watch_seconds, stale_seconds
        self._labels = {"labelSelector": labels} if labels else {}
        self._objects: dict[str, Object] = {}
        self._version = ""
        self._heard = float("-inf")
        self._trouble = "it has not been listed yet"

    def objects(self) -> Sequence[Object]:
        """All of them. Raise `TemporaryError` if they may be others by now."""
        age = time.monotonic() - self._heard
        if not self._version or age > self._stale_seconds:
            since = f"for {age:.0f} s" if self._version else "so far"
            raise TemporaryError(f"nothing was heard of {self._resource.plural} {since}: {self._trouble}")
        return list(self._objects.values())

    def note(self, found: Object) -> None:
        """Take in what the API server answered to a write, unless something newer has come."""
        ours = found.get("kind") == self._resource.kind
        # What the watch has passed already may have been deleted since.
        if ours and self._version and _version(found) > int(self._version):
            self._take(found)

    async def keep(self) -> None:
        """Follow the API server for ever."""
        failures = 0
        while True:
            try:
                if not self._version:
                    await self._list()
                began = time.monotonic()
                await self._watch()
                failures = 0
                # A proxy may end every watch at once, which is no reason to ask for the next one as fast as that.
                await asyncio.sleep(max(0.0, SHORTEST_WATCH - (time.monotonic() - began)))
            except ApiError as error:
                failures += 1
                self._trouble = str(error)
                if error.status == GONE:
                    self._version = ""
                log.log(logging.WARNING if failures == 1 else logging.DEBUG, "%s", error)
                pause = min(LONGEST_PAUSE, 0.1 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1)  # noqa: S311
                await asyncio.sleep(max(pause, error.delay if error.status else 0.0))

    async def _list(self) -> None:
        objects: dict[str, Object] = {}
        query = {"limit": str(PAGE), **self._labels}
        while True:
            page = await self._api.list(self._resource, query)
            objects |= {name_of(one): one for one in page.get("items") or ()}
            metadata = page["metadata"]
            if not metadata.get("continue"):
                break
            query["continue"] = metadata["continue"]
        self._objects, self._version = objects, metadata["resourceVersion"]
        self.lists += 1
        self._heard = time.monotonic()

    async def _watch(self) -> None:
        query = {
            "watch": "true", "resourceVersion": self._version, "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._watch_seconds), **self._labels,
        }  # fmt: skip
        async for event in self._api.watch(self._resource, query, self._watch_seconds + GRACE_SECONDS):
            self._heard = time.monotonic()
            if event is not None:
                self._apply(event)
        self._heard = time.monotonic()

    def _apply(self, event: Object) -> None:
        found: Object = event["object"]
        if event["type"] == "ERROR":
            words = f"{found.get('code')} {found.get('reason')}: {found.get('message')}"
            raise ApiError(f"the watch of {self._resource.plural} ended: {words}", int(found.get("code") or 500))
        if event["type"] == "DELETED":
            held = self._objects.get(name_of(found))
            if held is not None and held["metadata"]["uid"] == found["metadata"]["uid"]:
                del self._objects[name_of(found)]
        elif event["type"] != "BOOKMARK":
            self._take(found)
        self._version = found["metadata"]["resourceVersion"]

    def _take(self, found: Object) -> None:
        held = self._objects.get(name_of(found))
        # Versions of one kind are whole numbers that grow (Kubernetes 1.35 says so; etcd always did it).
        if held is None or _version(held) < _version(found):
            self._objects[name_of(found)] = found


def _version(found: Object) -> int:
    return int(found["metadata"]["resourceVersion"])
