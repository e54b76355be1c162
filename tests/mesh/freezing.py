"""Stops one process of a test at a chosen write, as a kill or a long pause would."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from shared.node import Node

OWN_LIFE = ("$KV.leases.", "$KV.replicas.")


class Freezer:
    """Everything that a node writes goes through it; once frozen, all of it waits for `thaw`."""

    def __init__(self, node: Node) -> None:
        self.frozen = asyncio.Event()
        self._thawed = asyncio.Event()
        self._left: int | None = None
        places: tuple[Any, ...] = (node.bus.stream_context, node.blobs)
        for place, names in zip(places, (("publish", "purge_stream"), ("put", "delete")), strict=True):
            for name in names:
                setattr(place, name, self._guarded(getattr(place, name)))

    def arm(self, writes: int) -> None:
        """Let so many more writes pass."""
        self._left = writes

    def thaw(self) -> None:
        """Go on, as a process does that was only paused."""
        self._left = None
        self.frozen.clear()
        self._thawed.set()

    def _guarded(self, write: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def instead(*arguments: Any, **named: Any) -> Any:
            if self._counts(str(arguments[0])):
                self._left = None if self._left is None else self._left - 1
                if self._left is not None and self._left < 0:
                    self.frozen.set()
            if self.frozen.is_set():
                await self._thawed.wait()
            return await write(*arguments, **named)

        return instead

    def _counts(self, where: str) -> bool:
        return self._left is not None and not where.startswith(OWN_LIFE)
