"""Typed key-value tables over JetStream buckets, with compare-and-set by revision."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nats.aio.client import Client
from nats.errors import (
    ConnectionClosedError,
    ConnectionDrainingError,
    ConnectionReconnectingError,
    NoRespondersError,
    OutboundBufferLimitError,
)
from nats.js import api
from nats.js import errors as js_errors

from shared import wire
from shared.errors import MeshError, PermanentError, StorageFull, TemporaryError
from shared.scans import Stored, scan
from shared.topology import Bucket, token, untoken

if TYPE_CHECKING:
    from shared.bus import Bus

T = TypeVar("T")
Key = str | tuple[str, ...]
log = logging.getLogger(__name__)

_PATIENCE = 20.0
AWAY = (
    TimeoutError,
    ConnectionReconnectingError,
    NoRespondersError,
    OutboundBufferLimitError,
    js_errors.NoStreamResponseError,
    js_errors.ServiceUnavailableError,
)
"""What the client library raises while the server cannot be reached, and may be again."""
CLOSED = (ConnectionClosedError, ConnectionDrainingError)
_WRONG_REVISION = {10071, 10164}
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_OPERATION = "KV-Operation"


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A value and its revision."""

    key: tuple[str, ...]
    value: T
    revision: int


@dataclass(frozen=True)
class Change(Generic[T]):
    """What became of a key; `value` None: it was deleted. Entries that expire give no change."""

    key: tuple[str, ...]
    value: T | None
    revision: int


def stored(raw: api.RawStreamMsg) -> Stored:
    """What the client library read, with its optional fields filled."""
    return Stored(raw.subject or "", raw.seq or 0, raw.data or b"", raw.headers or {})


def check_size(client: Client, subject: str, body: bytes, headers: Mapping[str, str]) -> None:
    """Raise `PermanentError` for a message that the server would not take.

    The client library looks at the body alone; with too long headers the server closes the connection.
    """
    # As NATS counts: the line NATS/1.0, a line for each header, an empty line, the body.
    size = len("NATS/1.0\r\n\r\n") + sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())
    size += len(body)
    if size > client.max_payload:
        raise PermanentError(
            f"a message of {size} bytes for {subject} is over the {client.max_payload} bytes that the bus takes"
        )


class Table(Generic[T]):
    """One bucket. A key is a name, or several, each made a subject token."""

    def __init__(self, bus: Bus, bucket: Bucket[T]) -> None:
        """Use `Bus.table`."""
        self._bus = bus
        self._bucket = bucket
        self._stream = f"KV_{bucket.name}"
        self._prefix = f"$KV.{bucket.name}."

    async def get(self, key: Key) -> Entry[T] | None:
        """The present entry, or None."""
        try:
            found = await self._read(self._subject(key))
        except js_errors.NotFoundError:
            return None
        return None if _OPERATION in found.headers else Entry(_key(key), self._decode(found.body), found.seq)

    async def was_deleted(self, key: Key) -> bool:
        """Whether there was an entry that has been deleted. Buckets whose entries expire forget this."""
        try:
            return _OPERATION in (await self._read(self._subject(key))).headers
        except js_errors.NotFoundError:
            return False

    async def items(self, within: Key = ()) -> list[Entry[T]]:
        """All entries, or those whose keys begin with the names in `within`, in the order of their last writing.

        What cannot be decoded is logged and left out.
        """
        subject = self._prefix + "".join(f"{token(part)}." for part in _key(within)) + ">"
        found: dict[tuple[str, ...], Entry[T]] = {}
        async for item in self._present(subject):
            if (change := self._change(item)) is None:
                continue
            # Seen before if it was written again meanwhile: the newest counts, at its new place.
            found.pop(change.key, None)
            if change.value is not None:
                found[change.key] = Entry(change.key, change.value, item.seq)
        return list(found.values())

    async def _present(self, subject: str) -> AsyncIterator[Stored]:
        """What is there now. In a cluster only the leader surely has all of it, and it is asked for one by one."""
        if self._bus.consistent:
            async for item in scan(self._bus.client, self._stream, subject):
                yield item
            return
        place = 0
        while True:
            try:
                item = await self._read(subject, seq=place + 1, next=True)
            except js_errors.NotFoundError:
                return
            place = item.seq
            yield item

    async def keys(self) -> set[tuple[str, ...]]:
        """The keys of all entries, in one question. One that was deleted may still be among them until it expires.

        Raise `TemporaryError`.
        """
        try:
            info = await self._bus.stream_context.stream_info(self._stream, subjects_filter=f"{self._prefix}>")
        except (*AWAY, *CLOSED, js_errors.APIError) as error:
            raise TemporaryError(
                f"bucket {self._bucket.name} does not answer: {error or type(error).__name__}"
            ) from None
        return {self._key_of(subject) for subject in info.state.subjects or {}}

    async def revision(self) -> int:
        """Of the newest entry, or deletion, of the whole bucket. 0: there was none yet."""
        try:
            return (await self._read(f"{self._prefix}>")).seq
        except js_errors.NotFoundError:
            return 0

    async def put(self, key: Key, value: T) -> int:
        """Write, whatever was there. Returns the revision."""
        return await self._write(key, value, {})

    async def create(self, key: Key, value: T) -> int | None:
        """Write if there is no entry. None: there is one."""
        revision = await self._write_if(key, value, 0)
        if revision is not None:
            return revision
        # A deletion leaves a marker with a revision of its own, which counts as no entry.
        try:
            found = await self._read(self._subject(key))
        except js_errors.NotFoundError:  # it has expired in between
            return await self._write_if(key, value, 0)
        return await self._write_if(key, value, found.seq) if _OPERATION in found.headers else None

    async def update(self, key: Key, value: T, revision: int) -> int | None:
        """Write if the entry still has `revision`. None: somebody else was faster, or it is gone."""
        return await self._write_if(key, value, revision)

    async def delete(self, key: Key) -> None:
        """Remove an entry, if there is one."""
        await self._publish(self._subject(key), b"", {_OPERATION: "DEL"})

    async def delete_if(self, key: Key, revision: int) -> bool:
        """Remove an entry if it still has `revision`. False: somebody else was faster, or it is gone."""
        try:
            await self._publish(self._subject(key), b"", {_OPERATION: "DEL", _EXPECTED: str(revision)})
        except js_errors.APIError as error:
            if error.err_code in _WRONG_REVISION:
                return False
            raise
        return True

    async def changes(self, *, after: int = 0) -> AsyncIterator[Change[T]]:
        """Every present entry behind revision `after`, oldest first, and then every change, for ever.

        What cannot be decoded is logged and passed over: one bad entry must not stop whoever follows all of them.
        """
        async for _, change in self.follow(after=after):
            if change is not None:
                yield change

    async def follow(self, *, after: int = 0) -> AsyncIterator[tuple[int, Change[T] | None]]:
        """As `changes`, with each revision, also that of an entry that cannot be decoded (None)."""
        subject = f"{self._prefix}>"
        async for raw in scan(self._bus.client, self._stream, subject, after=after):
            after = raw.seq
            yield raw.seq, self._change(raw)
        async for raw in self._bus.read(self._stream, subject, after=after):
            yield raw.seq, self._change(raw)

    def _change(self, raw: Stored) -> Change[T] | None:
        try:
            value = None if _OPERATION in raw.headers else self._decode(raw.body)
            return Change(self._key_of(raw.subject), value, raw.seq)
        except (MeshError, UnicodeDecodeError) as error:
            log.error("the entry %s is passed over: %s", raw.subject, error)
            return None

    async def _write_if(self, key: Key, value: T, revision: int) -> int | None:
        try:
            return await self._write(key, value, {_EXPECTED: str(revision)})
        except js_errors.APIError as error:
            if error.err_code in _WRONG_REVISION:
                return None
            raise

    async def _write(self, key: Key, value: T, headers: dict[str, str]) -> int:
        return await self._publish(self._subject(key), wire.encode(value, json=True), headers)

    async def _publish(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        # No message id: a compare-and-set that was stored although its answer was lost must not be told apart from
        # somebody else's, so after a timeout the caller sees a lost race and reads again.
        check_size(self._bus.client, subject, body, headers)
        give_up = asyncio.get_running_loop().time() + _PATIENCE
        while True:
            try:
                return (await self._bus.stream_context.publish(subject, body, timeout=3.0, headers=headers)).seq
            except AWAY as error:
                if asyncio.get_running_loop().time() > give_up:
                    raise TemporaryError(f"the bus did not store {subject}: {error or type(error).__name__}") from None
                await asyncio.sleep(0.2)
            except CLOSED:
                raise TemporaryError(f"not connected to the bus: {subject} was not written") from None
            except js_errors.APIError as error:
                if error.err_code in _WRONG_REVISION:
                    raise
                raise StorageFull(f"the bus refuses {subject}: {error.description}") from None

    async def _read(self, subject: str, **how: Any) -> Stored:
        give_up = asyncio.get_running_loop().time() + _PATIENCE
        while True:
            try:
                return await self._bus.newest(self._stream, subject, **how)
            except AWAY:
                if asyncio.get_running_loop().time() > give_up:
                    raise TemporaryError(f"the bus does not answer for {subject}") from None
                await asyncio.sleep(0.2)
            except js_errors.NotFoundError:
                raise
            except (*CLOSED, js_errors.APIError) as error:
                raise TemporaryError(f"{subject} cannot be read: {error}") from None

    def _subject(self, key: Key) -> str:
        return self._prefix + ".".join(token(part) for part in _key(key))

    def _key_of(self, subject: str) -> tuple[str, ...]:
        return tuple(untoken(part) for part in subject.removeprefix(self._prefix).split("."))

    def _decode(self, body: bytes) -> T:
        value: T = wire.decode(body, self._bucket.type, json=True)
        return value


def _key(key: Key) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key
