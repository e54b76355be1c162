"""Buckets in memory, kept up to date by watching: what is looked at with every request, or as a whole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from shared.errors import TemporaryError
from shared.tables import Table
from shared.tasks import Tasks

T = TypeVar("T")
Key = tuple[str, ...]
log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that `fresh` waits for changes which are known to be there."""
START_PATIENCE = 120.0
"""The same for the first reading of all entries."""


class Mirror(Generic[T]):
    """The present entries of a bucket, by key, moments after they change."""

    def __init__(self, table: Table[T], changed: Callable[[Key, T | None], None] | None = None) -> None:
        """`changed` is called with each entry as it comes; None for one that is deleted."""
        self._table = table
        self._values: dict[Key, T] = {}
        self._changed = changed
        self._place = 0
        self._waiting: set[asyncio.Event] = set()

    async def start(self, tasks: Tasks, name: str) -> None:
        """Read all entries, and follow the changes from then on. Entries that expire stay: the bucket does not tell."""
        tasks.start(f"follow {name}", self._follow())
        await self.fresh(START_PATIENCE)

    def get(self, *key: str) -> T | None:
        """The entry of a key."""
        return self._values.get(key)

    def items(self) -> Iterator[tuple[Key, T]]:
        """All entries, as they are now."""
        return iter(list(self._values.items()))

    @property
    def values(self) -> Mapping[Key, T]:
        """All entries, as they change."""
        return self._values

    async def fresh(self, patience: float = PATIENCE) -> Mapping[Key, T]:
        """All entries, at least as new as this call: who has just been told of an entry will find it.

        Asks the bucket for one number. Raise `TemporaryError` if the bus is away.
        """
        revision = await self._table.revision()
        moved = asyncio.Event()
        self._waiting.add(moved)
        try:
            async with asyncio.timeout(patience):
                while self._place < revision:
                    moved.clear()
                    await moved.wait()
        except TimeoutError:
            raise TemporaryError(f"what was written behind revision {self._place} cannot be read yet") from None
        finally:
            self._waiting.discard(moved)
        return self._values

    async def _follow(self) -> None:
        while True:
            try:
                async for revision, change in self._table.follow(after=self._place):
                    if change is not None:
                        self._set(change.key, change.value)
                    self._place = revision
                    for moved in self._waiting:
                        moved.set()
            except TemporaryError as error:
                log.warning("a bucket cannot be followed: %s, trying again", error)
                await asyncio.sleep(error.delay)

    def _set(self, key: Key, value: T | None) -> None:
        if value is None:
            self._values.pop(key, None)
        else:
            self._values[key] = value
        if self._changed is not None:
            self._changed(key, value)
