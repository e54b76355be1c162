"""Requests that nobody waits for any more, as far as this sampler has heard."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

REMEMBERED = 10_000
"""Newest abandoned requests that are known: they may still lie in the queue."""


class Abandoned:
    """Cancels the work of abandoned requests, now or when it begins."""

    def __init__(self) -> None:
        self._requests: dict[str, None] = {}
        self._working: dict[str, asyncio.Future[Any]] = {}

    def __contains__(self, request: str) -> bool:
        return request in self._requests

    def hear(self, request: str) -> None:
        """Whoever asked has given up."""
        self._requests[request] = None
        if len(self._requests) > REMEMBERED:
            del self._requests[next(iter(self._requests))]
        if (work := self._working.get(request)) is not None:
            work.cancel()

    @contextlib.contextmanager
    def cancelling(self, request: str, work: asyncio.Future[Any]) -> Iterator[None]:
        """Inside the block, cancel `work` when its request is abandoned, at once if it is already."""
        if request in self:
            work.cancel()
        self._working[request] = work
        try:
            yield
        finally:
            del self._working[request]
