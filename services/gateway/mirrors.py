"""Buckets in memory, kept up to date by watching: what is looked at with every request, or as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from shared.tables import Table
from shared.tasks import Tasks

T = TypeVar("T")
Key = tuple[str, ...]


class Mirror(Generic[T]):
    """The present entries of a bucket, by key, moments after they change."""

    def __init__(self, table: Table[T], changed: Callable[[Key, T | None], None] | None = None) -> None:
        """`changed` is called with each entry as it comes; None for one that is deleted."""
        self._table = table
        self._values: dict[Key, T] = {}
        self._changed = changed

    async def start(self, tasks: Tasks, name: str) -> None:
        """Read all entries, then follow the changes. Entries that expire stay: the bucket does not tell."""
        place = 0
        for entry in await self._table.items():
            place = entry.revision
            self._set(entry.key, entry.value)
        tasks.start(f"follow {name}", self._follow(place))

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

    async def _follow(self, place: int) -> None:
        async for change in self._table.changes(after=place):
            self._set(change.key, change.value)

    def _set(self, key: Key, value: T | None) -> None:
        if value is None:
            self._values.pop(key, None)
        else:
            self._values[key] = value
        if self._changed is not None:
            self._changed(key, value)
