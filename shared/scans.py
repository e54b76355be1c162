"""Reading a stretch of a stream from its beginning to its present end, many messages with one request.

Some eight times as fast as one request for each message (batched direct get, NATS ADR-31; nats-server 2.11). Nothing
is left behind at the server, so any replica may read any stream at any time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import api

from shared.errors import TemporaryError

BATCH = 512
"""Messages for one request."""
BATCH_BYTES = 8 << 20
"""Bytes for one request: what a scan holds in memory."""
PATIENCE = 20.0
"""Seconds to wait for a server that is away."""
_SILENCE = 3.0
"""Seconds without a message after which a request is sent again."""
_STATUS = "Status"
_SEQUENCE = "Nats-Sequence"
_SUBJECT = "Nats-Subject"
_TIME = "Nats-Time-Stamp"
_END = "204"
_NOTHING = "404"


@dataclass(frozen=True)
class Stored:
    """A message of a stream as bytes."""

    subject: str
    seq: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def time(self) -> float:
        """When the stream stored it, in seconds since the epoch; 0: not told."""
        written = self.headers.get(_TIME, "")
        return datetime.fromisoformat(written).timestamp() if written else 0.0

    @property
    def msg_id(self) -> str:
        """The id that its publisher gave it; empty: none."""
        return self.headers.get(api.Header.MSG_ID.value, "")


async def scan(
    client: Client, stream: str, subject: str, *, after: int = 0, since: float | None = None
) -> AsyncIterator[Stored]:
    """The messages of `stream` on `subject` (wildcards allowed) that are there now, oldest first.

    Only those behind place `after`, or stored at `since` (seconds since the epoch) or later. Raise `TemporaryError`
    if the server is away for too long; what has been given out until then is right.
    """
    place, begin = after, since
    give_up = asyncio.get_running_loop().time() + PATIENCE
    async with _Inbox(client) as inbox:
        while True:
            batch, complete, ended = await inbox.ask(stream, _request(subject, place, begin))
            for message in batch:
                yield message
            if batch:
                place, begin = batch[-1].seq, None
                give_up = asyncio.get_running_loop().time() + PATIENCE
            if ended:
                return
            if not complete and asyncio.get_running_loop().time() > give_up:
                raise TemporaryError(f"the bus does not answer for {subject}")


def _request(subject: str, place: int, begin: float | None) -> dict[str, object]:
    request: dict[str, object] = {"next_by_subj": subject, "batch": BATCH, "max_bytes": BATCH_BYTES}
    if begin is None:
        return {**request, "seq": place + 1}
    return {**request, "start_time": datetime.fromtimestamp(begin, UTC).isoformat()}


class _Inbox:
    """Where the messages of one scan arrive."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._name = client.new_inbox()
        self._arrived: asyncio.Queue[Msg] = asyncio.Queue()
        self._round = 0

    async def __aenter__(self) -> _Inbox:
        try:
            self._subscription = await self._client.subscribe(f"{self._name}.*", cb=self._arrived.put)
        except NatsError as error:
            raise TemporaryError(f"not connected to the bus: {error}") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._client.is_closed:
            await self._subscription.unsubscribe()

    async def ask(self, stream: str, request: Mapping[str, object]) -> tuple[list[Stored], bool, bool]:
        """One batch; whether the server said that this was all of it; and whether nothing lies behind it."""
        self._round += 1
        reply = f"{self._name}.{self._round}"
        batch: list[Stored] = []
        try:
            # Each round has a subject of its own: what comes too late for an earlier one is passed over.
            await self._client.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), reply=reply)
            while True:
                message = await self._next()
                if message.subject != reply:
                    continue
                headers = message.headers or {}
                if _SEQUENCE in headers:
                    batch.append(Stored(headers[_SUBJECT], int(headers[_SEQUENCE]), message.data, headers))
                elif headers.get(_STATUS) in (_END, _NOTHING):
                    return batch, True, headers[_STATUS] == _NOTHING or headers.get("Nats-Num-Pending") == "0"
                else:  # nobody serves the stream at this moment, as while a cluster elects a leader
                    await asyncio.sleep(0.2)
                    return batch, False, False
        except (NatsError, TimeoutError):
            await asyncio.sleep(0.2)
            return batch, False, False

    async def _next(self) -> Msg:
        if not self._arrived.empty():  # a timer for each message would cost more than the message
            return self._arrived.get_nowait()
        return await asyncio.wait_for(self._arrived.get(), _SILENCE)
