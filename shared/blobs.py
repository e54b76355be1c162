"""Blobs: what is too large for the bus, above all weights.

Over `obstore`: a local directory, `s3://bucket/prefix` or `gs://bucket/prefix`, with the usual environment variables
of those services. A blob is written once and never changes; whoever reads it compares the checksum.

Its blocking calls are used, in threads of Python's. Its own threads, which serve the asynchronous ones, may still touch
the interpreter while that ends, and abort the process (seen with obstore 0.12.1 in a tenth of short processes).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from shared.contracts.blobs import BlobRef
from shared.errors import PermanentError, StorageFull, TemporaryError, UserError

log = logging.getLogger(__name__)


_AT_ONCE = 256 * 1024
"""Bytes whose checksum takes less time (0.2 ms) than going to another thread is worth."""


async def checksum(content: bytes) -> str:
    """SHA-256 in hexadecimal. Of weights it takes as long as many messages: not in the event loop."""
    if len(content) <= _AT_ONCE:
        return hashlib.sha256(content).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())


class Blobs(Protocol):
    """A place for blobs."""

    async def put(self, key: str, content: bytes, *, sha256: str | None = None) -> BlobRef:
        """Write a blob. Writing the same content again is harmless, other content under the same key an error.

        `sha256` is the content's checksum, from whoever knows it already.
        """

    async def get(self, ref: BlobRef) -> bytes:
        """Read a blob. Raise `PermanentError` if it is missing or not what `ref` says."""

    async def delete(self, key: str) -> None:
        """Remove a blob, if it is there."""


class BlobStore:
    """Blobs in a directory or a bucket."""

    def __init__(self, url: str) -> None:
        """`url` is a directory or a URL that `obstore` knows. Raise `UserError` for any other."""
        self.url = url
        try:
            self._store: ObjectStore = from_url(url) if "://" in url else LocalStore(_directory(url), mkdir=True)
        except (BaseError, OSError, ValueError) as error:
            raise UserError(f"blob store {url!r} cannot be opened: {_first_line(error)}") from None

    async def sweep(self, prefix: str, older_than: float) -> int:
        """Delete blobs below `prefix` that were written more than `older_than` seconds ago; how many. Raises nothing.

        For what nobody can own to the end: bodies of messages that have aged out of their streams.
        """
        limit = datetime.now(UTC) - timedelta(seconds=older_than)
        deleted = 0
        try:
            for path in await asyncio.to_thread(self._written_before, prefix, limit):
                await self.delete(path)
                deleted += 1
        except (BaseError, OSError, TemporaryError) as error:
            log.warning("old blobs below %s stay for now: %s", prefix, _first_line(error))
        return deleted

    def _written_before(self, prefix: str, limit: datetime) -> list[str]:
        pages = obstore.list(self._store, prefix)
        return [blob["path"] for page in pages for blob in page if blob["last_modified"] < limit]

    def path(self, key: str) -> Path | None:
        """Where a blob lies in the file system; None for a bucket."""
        return None if "://" in self.url else _directory(self.url) / key

    async def put(self, key: str, content: bytes, *, sha256: str | None = None) -> BlobRef:
        """See `Blobs.put`. Raise `StorageFull` when there is no room."""
        ref = BlobRef(key=key, sha256=sha256 or await checksum(content), size=len(content))
        try:
            await asyncio.to_thread(obstore.put, self._store, key, content, mode="create")
        except AlreadyExistsError:
            await self.get(ref)
        except (BaseError, OSError) as error:
            raise _storage_error(f"blob {key!r} cannot be written to {self.url}", error) from None
        return ref

    async def get(self, ref: BlobRef) -> bytes:
        """See `Blobs.get`."""
        try:
            content = await asyncio.to_thread(self._read, ref.key)
        except FileNotFoundError:
            raise PermanentError(f"blob {ref.key!r} is missing from {self.url}") from None
        except (BaseError, OSError) as error:
            raise TemporaryError(f"blob {ref.key!r} cannot be read from {self.url}: {_first_line(error)}") from None
        if await checksum(content) != ref.sha256:
            raise PermanentError(f"blob {ref.key!r} in {self.url} is not what was written: its checksum differs")
        return content

    async def read(self, ref: BlobRef, begin: int, length: int) -> bytes:
        """Read a part of a blob, for whoever does not want all of it in memory. Raise as `get`, but nothing is checked.

        The part may be shorter where the blob is damaged.
        """
        try:
            part = await asyncio.to_thread(obstore.get_range, self._store, ref.key, start=begin, length=length)
        except FileNotFoundError:
            raise PermanentError(f"blob {ref.key!r} is missing from {self.url}") from None
        except (BaseError, OSError) as error:
            raise TemporaryError(f"blob {ref.key!r} cannot be read from {self.url}: {_first_line(error)}") from None
        return bytes(part)

    async def copy(self, ref: BlobRef, key: str) -> BlobRef:
        """Write a blob again under another key, without reading it here. Raise as `get` and `put` do."""
        try:
            await asyncio.to_thread(obstore.copy, self._store, ref.key, key)
        except FileNotFoundError:
            raise PermanentError(f"blob {ref.key!r} is missing from {self.url}") from None
        except (BaseError, OSError) as error:
            raise _storage_error(f"blob {ref.key!r} cannot be copied in {self.url}", error) from None
        return BlobRef(key=key, sha256=ref.sha256, size=ref.size)

    def _read(self, key: str) -> bytes:
        return bytes(obstore.get(self._store, key).bytes())

    async def delete(self, key: str) -> None:
        """See `Blobs.delete`."""
        try:
            await asyncio.to_thread(obstore.delete, self._store, key)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise TemporaryError(f"blob {key!r} cannot be deleted: {_first_line(error)}") from None


def _directory(url: str) -> Path:
    return Path(url).expanduser().absolute()


def _storage_error(what: str, error: Exception) -> TemporaryError:
    text = str(error)
    if "No space left" in text or "StorageFull" in text or "quota" in text.lower():
        return StorageFull(f"{what}: no space left. Free some; the work goes on by itself then", delay=5.0)
    return TemporaryError(f"{what}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
