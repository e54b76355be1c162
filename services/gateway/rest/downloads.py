"""Files of checkpoints, by links that work without a key: streamed, in ranges if asked, and never damaged in silence.

A whole file is compared with its checksum while it goes out, and its last part held back until it is right; a range is
taken from a file that has been compared before. A damaged file so ends as a connection that is cut, or an error.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from services.gateway.access import is_live, readable_checkpoint
from services.gateway.auth import Caller
from services.gateway.context import Answer, Call, Endpoint, Gateway
from services.gateway.errors import NotFound
from services.gateway.ids import shown
from services.gateway.rest import links, ranges
from services.gateway.rest.answers import Urls, at
from services.gateway.rest.holdings import ACCESS_TOKEN, key_of, store
from services.gateway.rest.ranges import Span
from shared.blobs import BlobStore
from shared.checkpoints import SEGMENTS, details_of, path_of
from shared.contracts.blobs import BlobRef
from shared.contracts.checkpoints import CheckpointKey
from shared.errors import PermanentError, UserError

PART = 4 << 20
"""Bytes in memory for each download."""
COMPARED = 4096
"""Files of which it is remembered that they are right."""


async def urls(gateway: Gateway, call: Call) -> Urls:
    """Links to the files of a checkpoint."""
    record = await readable_checkpoint(gateway, call, key_of(call), "download_urls", call.header(ACCESS_TOKEN))
    if not record.files:
        raise UserError(
            f"{path_of(record.key)} has no files to download, being a {record.key.kind} checkpoint: load it, and save "
            "it with save_weights_external (`tinker checkpoint download` does both)"
        )
    expires = time.time() + links.SECONDS
    expires = expires if record.expires is None else min(expires, record.expires)
    return Urls(
        {name: links.link(gateway, call, _path(record.key, name), expires) for name in sorted(record.files)},
        at(int(expires)),
    )


async def download(gateway: Gateway, call: Call) -> Answer:
    """A file of a checkpoint."""
    key, name = key_of(call), call.path["file"]
    links.check(gateway.signer, call, _path(key, name))
    entry = await store(gateway).find(key)
    if entry is None or not is_live(entry.value) or name not in entry.value.files:
        raise NotFound(f"there is no file {shown(name)} of {shown(path_of(key), 240)} (any more)")
    ref = entry.value.files[name]
    span = _span(call, ref)
    if span is not None:
        await _compare(gateway, ref)
    answer = await _answer(gateway.blobs, ref, span)
    if span is None or span.begin == 0:
        holder = replace(call, caller=Caller(tenant=entry.value.owner))  # nobody knows who has followed the link
        await gateway.audit(holder, "checkpoint_read", purpose="download", file=name, **details_of(entry.value))
    return answer


async def _answer(blobs: BlobStore, ref: BlobRef, span: Span | None) -> Answer:
    begin, end = span or Span(0, ref.size)
    headers = {
        "Content-Length": str(end - begin),
        "Accept-Ranges": "bytes",
        "ETag": _tag(ref),
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(ref.sha256)).decode()}:",
    }
    if span is not None:
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{ref.size}"
    chunks = _whole(blobs, ref) if span is None else _parts(blobs, ref, span)
    first = await anext(chunks)  # what is wrong from the beginning can still be told
    status = 200 if span is None else 206
    return Answer(first, "application/octet-stream", status=status, headers=headers, chunks=chunks)


async def _whole(blobs: BlobStore, ref: BlobRef) -> AsyncIterator[bytes]:
    digest, held = hashlib.sha256(), b""
    async for part in _parts(blobs, ref, Span(0, ref.size)):
        digest.update(part)
        if held:
            yield held
        held = part
    if digest.hexdigest() != ref.sha256:
        raise PermanentError(f"blob {ref.key!r} in {blobs.url} is not what was written: its checksum differs")
    yield held


async def _parts(blobs: BlobStore, ref: BlobRef, span: Span) -> AsyncIterator[bytes]:
    place = span.begin
    while place < span.end:
        part = await blobs.read(ref, place, min(PART, span.end - place))
        if not part:
            raise PermanentError(f"blob {ref.key!r} in {blobs.url} ends after {place} bytes: it is damaged")
        yield part
        place += len(part)


async def _compare(gateway: Gateway, ref: BlobRef) -> None:
    """Read a file to its end, unless that was done before. Raise `PermanentError` if it is damaged."""
    if ref.key in gateway.compared:
        return
    async for _ in _whole(gateway.blobs, ref):
        pass
    gateway.compared[ref.key] = None
    if len(gateway.compared) > COMPARED:
        gateway.compared.pop(next(iter(gateway.compared)))


def _span(call: Call, ref: BlobRef) -> Span | None:
    condition = call.header(b"if-range")
    if condition and condition != _tag(ref):
        return None
    return ranges.asked(call.header(b"range"), ref.size)


def _tag(ref: BlobRef) -> str:
    return f'"{ref.sha256}"'


def _path(key: CheckpointKey, name: str) -> str:
    return f"downloads/{key.run}/{SEGMENTS[key.kind]}/{key.name}/{name}"


ENDPOINTS = (
    Endpoint("GET", "training_runs/{run}/checkpoints/{folder}/{name}/external_weights_urls", urls),
    Endpoint("GET", "downloads/{run}/{folder}/{name}/{file:path}", download, public=True),
)
