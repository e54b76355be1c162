"""The bus: typed messages over NATS JetStream.

Publishing waits until the server has stored the message, and tries again with the same message id while the server is
away, so nothing is lost or doubled. Logs are read by sequence number rather than through server-side consumers: the
reader's place is a number that it keeps itself, and a restarted server or reader simply goes on from there; a plain
subscription only wakes it. Work queues are read by `shared.worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import AuthorizationError, ConnectionClosedError
from nats.errors import Error as NatsError
from nats.js import JetStreamContext, api
from nats.js import errors as js_errors

from shared import observe, provision, topology, wire
from shared.blobs import Blobs, checksum
from shared.contracts.blobs import BlobRef
from shared.contracts.results import DeadLetter, RequestFailed, Result
from shared.errors import MeshError, PermanentError, StorageFull, TemporaryError, UserError, failure_of
from shared.scans import Stored, scan
from shared.tables import AWAY, CLOSED, Table, check_size, stored
from shared.topology import Bucket, Channel, Kept

T = TypeVar("T")
log = logging.getLogger(__name__)

CLAIM_CHECK_BYTES = 512 * 1024
"""A larger body goes to the blob store; the message carries the reference."""
BLOB_HEADER = "Openrl-Blob"
REQUEST_HEADER = "Openrl-Request"
PUBLISH_PATIENCE = 20.0
"""Seconds that a publisher waits for a server that is away: a cluster elects a new leader in up to seven."""
CONNECT_PATIENCE = 5.0
"""Seconds to wait for a server at the start: it may be starting too."""
BACKSTOP = 5.0
"""Seconds after which a reader looks again although nothing woke it: a wake-up may be lost when a connection breaks."""
_WAKE_DELAYS = (0.002, 0.01, 0.05, 0.2, 1.0)
"""A wake-up may come before the stream has stored the message, so look again soon."""

OnUnreadable = Callable[[Stored, PermanentError], Awaitable[None]]


@dataclass(frozen=True)
class Delivery(Generic[T]):
    """A message as it came."""

    message: T
    subject: str
    seq: int
    """Its place in the stream."""
    deliveries: int = 1
    """How often it was given out, this time included."""
    json: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    time: float = 0.0
    """When the stream stored it, in seconds since the epoch; 0: not told."""


@dataclass(frozen=True)
class Login:
    """Who this process is to the nats-server, and how it knows the server. Empty: not needed."""

    user: str = ""
    password: str = field(default="", repr=False)
    credentials: str = ""
    """File with a JWT and its seed, as `nsc` writes it."""
    ca: str = ""
    """File with the certificates that the server's is checked by; with it the connection is encrypted."""

    def options(self) -> dict[str, Any]:
        """The same, as the client library takes it. Raise `UserError` for a file that cannot be read."""
        options: dict[str, Any] = {"user": self.user, "password": self.password} if self.user else {}
        try:
            if self.credentials:
                Path(self.credentials).read_bytes()  # the library would say so only in its log, again and again
                options["user_credentials"] = self.credentials
            if self.ca:
                options["tls"] = ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            raise UserError(f"{self.credentials or self.ca} cannot be used to log in to the bus: {error}") from None
        return options


class Bus:
    """A connection to the mesh."""

    consistent = True
    """Whether whoever answers a direct read has seen all that was stored. Only so with a single server: in a cluster
    any of those that keep a stream answers, and may be some milliseconds behind."""

    def __init__(self, client: Client, blobs: Blobs, name: str) -> None:
        """Use `connect`."""
        self.client = client
        self.stream_context: JetStreamContext = client.jetstream(timeout=5.0)
        self.blobs = blobs
        # Plain, so that it passes where others' request ids are looked at closely.
        self.asker = f"{topology.token(name).replace('=', '-')}-{uuid.uuid4().hex[:8]}"
        self._waiting: dict[str, asyncio.Future[Result]] = {}
        self._answers_open = False

    @classmethod
    async def connect(cls, url: str, blobs: Blobs, *, name: str, replicas: int = 1, login: Login | None = None) -> Bus:
        """Connect and see to it that streams and buckets are there, each kept by `replicas` servers or more.

        `url` may be several, with commas between. Raise `UserError` if no server answers or lets us in; later
        interruptions are waited out.
        """
        client = Client()
        options = (login or Login()).options()
        try:
            async with asyncio.timeout(CONNECT_PATIENCE):
                await client.connect(
                    url.split(","),
                    name=name,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=1,
                    connect_timeout=3,
                    error_cb=_log_error,
                    pending_size=64 * topology.MIB,
                    **options,
                )
        except (OSError, NatsError):
            await client.close()
            raise UserError(_no_connection(url, client.last_error)) from None
        bus = cls(client, blobs, name)
        bus.consistent = await provision.provide(bus.stream_context, replicas) == 1
        return bus

    @property
    def connected(self) -> bool:
        """Whether the server can be reached at this moment."""
        return self.client.is_connected

    @property
    def usable(self) -> bool:
        """Whether it can still be reached at some time. No longer so once a server has refused to let us in again."""
        return not self.client.is_closed

    async def close(self) -> None:
        """Say goodbye. What was published has already been stored."""
        for waiting in self._waiting.values():
            waiting.cancel()
        if not self.client.is_closed:
            with contextlib.suppress(NatsError, OSError):  # nobody is left to say it to
                await self.client.close()

    # -- publishing ----------------------------------------------------------------------------------------------

    async def publish(
        self,
        channel: Channel[T],
        message: T,
        *,
        msg_id: str | None = None,
        json: bool | None = None,
        **parts: str,
    ) -> int:
        """Store a message on its channel and return its place in the stream.

        A second message with the same `msg_id` (within the stream's window) is dropped by the server. `json`
        overrides the channel's own choice. Raise `StorageFull` or `TemporaryError`; in both cases nothing was stored,
        or the same `msg_id` may safely be sent again. Raise `PermanentError` for what the server never takes.
        """
        as_json = channel.json if json is None else json
        body = wire.encode(message, json=as_json)
        headers = {wire.CONTENT_TYPE: wire.JSON if as_json else wire.MSGPACK, **observe.trace_headers()}
        if request := getattr(message, "request_id", None):
            headers[REQUEST_HEADER] = request
        if len(body) > CLAIM_CHECK_BYTES:
            headers[BLOB_HEADER] = await self._check_in(body)
            body = b""
        headers[api.Header.MSG_ID.value] = msg_id or uuid.uuid4().hex
        return await self._store(channel.subject_of(message, **parts), body, headers)

    async def answer(self, result: Result, *, json: bool | None = None, msg_id: str | None = None) -> None:
        """Publish the one answer of a request. A second one is dropped, unless it has another `msg_id`."""
        await self.publish(
            topology.ANSWERS,
            result,
            msg_id=msg_id or f"answer/{result.request_id}",
            json=json,
            request=result.request_id,
        )

    async def bury(self, stream: str, subject: str, body: bytes, headers: Mapping[str, str], why: str, n: int) -> None:
        """Keep a message that cannot be handled, with its reason, and tell whoever asked."""
        log.error("message on %s given up after %d deliveries: %s", subject, n, why)
        letter = DeadLetter(stream=stream, subject=subject, reason=why, deliveries=n, body=body, headers=dict(headers))
        await self.publish(topology.DEAD_LETTERS, letter, stream=stream)

    async def refuse(self, raw: Stored, error: BaseException) -> None:
        """Tell whoever sent a message why nothing came of it, if it says who that is."""
        headers, msg_id = raw.headers, None
        request = headers.get(REQUEST_HEADER)
        if not request:
            # A bare client writes it into the body only. It may also use an id again, so each message is answered.
            request = wire.request_in(raw.body)
            msg_id = f"answer/{request}/{raw.seq}"
        if not request or not topology.is_request(request):
            return
        json = "json" in headers.get(wire.CONTENT_TYPE, wire.JSON)
        await self.answer(RequestFailed(request_id=request, failure=failure_of(error)), json=json, msg_id=msg_id)

    async def _check_in(self, body: bytes) -> str:
        # Named by its content: a publisher that tries again does not leave a copy each time.
        digest = await checksum(body)
        ref = await self.blobs.put(f"{topology.BODIES}{digest}", body, sha256=digest)
        return wire.encode(ref, json=True).decode()

    async def _store(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        check_size(self.client, subject, body, headers)
        give_up = asyncio.get_running_loop().time() + PUBLISH_PATIENCE
        while True:
            try:
                return (await self.stream_context.publish(subject, body, timeout=3.0, headers=headers)).seq
            except js_errors.APIError as error:
                if error.err_code in provision.FULL:
                    raise StorageFull(f"the bus has no room for {subject}: {error.description}", delay=5.0) from None
                if not isinstance(error, AWAY):
                    raise PermanentError(f"the bus refuses a message on {subject}: {error.description}") from None
            except AWAY:
                pass
            except CLOSED:
                raise TemporaryError(f"not connected to the bus: {subject} was not published") from None
            if asyncio.get_running_loop().time() > give_up:
                raise TemporaryError(
                    f"the bus did not store a message on {subject} in {PUBLISH_PATIENCE:g} s: its server is away, or "
                    "its disk is full (`openrl status` and `openrl logs nats-server` tell)"
                )
            await asyncio.sleep(0.2)

    # -- reading -------------------------------------------------------------------------------------------------

    async def follow(
        self, channel: Channel[T], *, after: int = 0, on_unreadable: OnUnreadable | None = None, **parts: str
    ) -> AsyncIterator[Delivery[T]]:
        """Every message of a channel behind place `after`, in order, and then each new one as it comes.

        Without `parts`, the messages of all its subjects. What cannot be decoded is buried, its asker told, and
        passed over; `on_unreadable` hears of it then.
        """
        subject = channel.subject(**parts) if parts else channel.pattern
        async for raw in self.read(channel.stream.name, subject, after=after):
            try:
                message, json = await self.open(channel, raw.body, raw.headers)
            except TemporaryError as error:
                log.warning("reading %s: %s, trying again", raw.subject, error)
                await asyncio.sleep(error.delay)
                async for again in self.follow(channel, after=raw.seq - 1, on_unreadable=on_unreadable, **parts):
                    yield again
                return
            except PermanentError as error:
                await self.bury(channel.stream.name, raw.subject, raw.body, raw.headers, str(error), 1)
                await self.refuse(raw, error)
                if on_unreadable is not None:
                    await on_unreadable(raw, error)
                continue
            yield Delivery(message, raw.subject, raw.seq, json=json, headers=raw.headers, time=raw.time)

    async def read(self, stream: str, subject: str, *, after: int = 0) -> AsyncIterator[Stored]:
        """Messages as bytes, of a stream on a subject (wildcards allowed), in order, for ever."""
        wake = asyncio.Event()

        async def woken(_: Msg) -> None:
            wake.set()

        subscription = await self.client.subscribe(subject, cb=woken)
        place = after
        delays = iter(_WAKE_DELAYS)
        try:
            while True:
                wake.clear()
                raw = await self._next(stream, subject, place + 1)
                if raw is not None:
                    place = raw.seq
                    delays = iter(_WAKE_DELAYS)
                    yield raw
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(next(delays, BACKSTOP)):
                        await wake.wait()
                    delays = iter(_WAKE_DELAYS)
        finally:
            with contextlib.suppress(ConnectionClosedError):
                await subscription.unsubscribe()

    async def scan(
        self, channel: Channel[T], *, since: float | None = None, **parts: str
    ) -> AsyncIterator[Delivery[T]]:
        """The messages of a channel that are there now, oldest first; `since`: only those stored then or later.

        Without `parts`, the messages of all its subjects. What cannot be decoded, or whose body is gone, is logged and
        passed over. Raise `TemporaryError`.
        """
        subject = channel.subject(**parts) if parts else channel.pattern
        async for raw in scan(self.client, channel.stream.name, subject, since=since):
            try:
                message, json = await self.open(channel, raw.body, raw.headers)
            except PermanentError as error:
                log.warning("message %d on %s is passed over: %s", raw.seq, raw.subject, error)
                continue
            yield Delivery(message, raw.subject, raw.seq, json=json, headers=raw.headers, time=raw.time)

    async def open(self, channel: Channel[T], body: bytes, headers: Mapping[str, str]) -> tuple[T, bool]:
        """Decode a body, fetched from the blob store first if it lies there. Returns the message and if it was JSON."""
        if ref := headers.get(BLOB_HEADER):
            body = await self.blobs.get(wire.decode(ref.encode(), BlobRef, json=True))
        json = wire.is_json(dict(headers), body)
        return wire.decode(body, channel.type, json=json), json

    async def discard_body(self, headers: Mapping[str, str]) -> None:
        """Remove a body that went to the blob store, once nobody will read it again."""
        ref = wire.decode(headers[BLOB_HEADER].encode(), BlobRef, json=True)
        await self.blobs.delete(ref.key)

    async def _next(self, stream: str, subject: str, seq: int) -> Stored | None:
        try:
            return stored(await self.stream_context.get_msg(stream, seq=seq, subject=subject, direct=True, next=True))
        except js_errors.NotFoundError:
            return None
        except (*AWAY, ConnectionClosedError, js_errors.APIError) as error:
            if self.client.is_closed:
                raise TemporaryError("the connection to the bus is closed") from None
            log.warning("reading %s: %s, trying again", subject, error)
            await asyncio.sleep(0.5)
            return None

    async def newest(self, stream: str, subject: str, **how: Any) -> Stored:
        """The newest message of a subject that the server has acknowledged, to whomever. Raises the library's errors.

        Other than `read`, where a message that is not seen yet is seen a moment later, this must not miss one.
        """
        return stored(await self.stream_context.get_msg(stream, subject=subject, direct=self.consistent, **how))

    async def last_place(self, channel: Channel[Any], **parts: str) -> int:
        """Place of the newest message of a channel, in the line that `parts` name or else in any; 0: there is none.

        Raise `TemporaryError`.
        """
        subject = channel.subject(**parts) if parts else channel.pattern
        lines = [subject, f"{subject}.*"] if channel.by and channel.by not in parts else [subject]
        return max([await self._last_place(channel.stream.name, line) for line in lines])

    async def _last_place(self, stream: str, subject: str) -> int:
        try:
            return (await self.newest(stream, subject)).seq
        except js_errors.NotFoundError:
            return 0
        except (*AWAY, *CLOSED, js_errors.APIError) as error:
            raise TemporaryError(f"the bus does not answer for {subject}: {error or type(error).__name__}") from None

    async def purge(self, channel: Channel[Any], *, up_to: int | None = None, **parts: str) -> None:
        """Remove the messages of one subject, all or up to and including place `up_to`. Raise `TemporaryError`."""
        try:
            await self._purge(channel, up_to, parts)
        except (NatsError, TimeoutError) as error:
            raise TemporaryError(f"{channel.subject(**parts)} could not be purged: {error}") from None

    async def _purge(self, channel: Channel[Any], up_to: int | None, parts: Mapping[str, str]) -> None:
        subject = channel.subject(**parts)
        seq = None if up_to is None else up_to + 1
        await self.stream_context.purge_stream(channel.stream.name, seq=seq, subject=subject)

    # -- asking --------------------------------------------------------------------------------------------------

    def new_request(self) -> str:
        """A request id whose answer this process will see."""
        return f"{self.asker}.{uuid.uuid4().hex}"

    async def ask(
        self,
        channel: Channel[T],
        message: T,
        *,
        msg_id: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - bounds the answer, not this call's own clean-up
        **parts: str,
    ) -> Result:
        """Publish a request and wait for its answer, for which it has a `request_id`.

        With an id of the caller's own making (not from `new_request`) the answer may have come before: it is found.
        A request on a work queue is abandoned when the caller is cancelled or `timeout` is over; an operation of a log
        is done all the same. Raise `UserError` or `PermanentError` if the request was refused, `TemporaryError` after
        `timeout` seconds.
        """
        request = str(getattr(message, "request_id"))  # noqa: B009 - every request has one; T cannot say so
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting[request] = answer
        try:
            async with self._listening(request), asyncio.timeout(timeout):
                await self.publish(channel, message, msg_id=msg_id or request, json=None, **parts)
                return checked(await self._answered(request, answer))
        except asyncio.CancelledError:
            await self._abandon(channel, request)
            raise
        except TimeoutError:
            await self._abandon(channel, request)
            raise TemporaryError(f"no answer to a request on {channel.name} in {timeout or 0:g} s") from None
        finally:
            self._waiting.pop(request, None)

    async def hear_abandoned(self, heard: Callable[[str], None]) -> None:
        """Call `heard` from now on with each request whose asker has given up."""

        async def on_message(message: Msg) -> None:
            heard(topology.abandoned_request(message.subject))

        await self.client.subscribe(f"{topology.ABANDONED}.>", cb=on_message)

    async def _abandon(self, channel: Channel[Any], request: str) -> None:
        if channel.stream.kept is Kept.UNTIL_DONE:
            await self.abandon(request)

    async def abandon(self, request: str) -> None:
        """Say that nobody waits for a request on a work queue any more. Whoever does not hear it works in vain."""
        with contextlib.suppress(NatsError):
            await self.client.publish(topology.abandoned(request), b"")

    async def answer_of(self, request: str) -> Result | None:
        """The answer of a request, if it is there and not older than an hour."""
        try:
            raw = await self.stored_answer(request)
        except TemporaryError:
            return None
        return None if raw is None else (await self.open(topology.ANSWERS, raw.body, raw.headers))[0]

    async def stored_answer(self, request: str) -> Stored | None:
        """The same as it is stored, for `open`. Raise `TemporaryError` if the bus does not answer."""
        subject = topology.ANSWERS.subject(request=request)
        try:
            return await self.newest(topology.RESULTS.name, subject)
        except js_errors.NotFoundError:
            return None
        except (*AWAY, *CLOSED, js_errors.APIError) as error:
            raise TemporaryError(f"the bus does not answer for {subject}: {error or type(error).__name__}") from None

    async def hear_answers(self, asker: str, heard: Callable[[Stored], None]) -> Callable[[], Awaitable[None]]:
        """Call `heard` from now on with each answer to requests `asker.…`, as it is sent: its place is not known.

        Returns what ends this. While the connection is interrupted answers are missed (see `interruptions`).
        """

        async def on_message(message: Msg) -> None:
            heard(Stored(message.subject, 0, message.data, message.headers or {}))

        subscription = await self.client.subscribe(topology.answers_of(asker), cb=on_message)

        async def end() -> None:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()

        return end

    def read_answers(self, asker: str, *, after: int = 0) -> AsyncIterator[Stored]:
        """The answers to requests `asker.…` behind place `after`, and then each new one, for ever."""
        return self.read(topology.RESULTS.name, topology.answers_of(asker), after=after)

    @property
    def interruptions(self) -> int:
        """How often the connection has been lost and made again."""
        return int(self.client.stats["reconnects"])

    async def _answered(self, request: str, answer: asyncio.Future[Result]) -> Result:
        patience = BACKSTOP if self._is_own(request) else 0.0
        while True:
            done, _ = await asyncio.wait([answer], timeout=patience)
            if done:
                return answer.result()
            if (earlier := await self.answer_of(request)) is not None:
                return earlier
            patience = BACKSTOP

    def _is_own(self, request: str) -> bool:
        return request.startswith(f"{self.asker}.")

    @contextlib.asynccontextmanager
    async def _listening(self, request: str) -> AsyncIterator[None]:
        """Hear the answer: one subscription for all requests of `new_request`, one each for others."""
        if not self._is_own(request):
            subscription = await self.client.subscribe(topology.ANSWERS.subject(request=request), cb=self._on_answer)
            try:
                yield
            finally:
                with contextlib.suppress(NatsError):
                    await subscription.unsubscribe()
            return
        if not self._answers_open:
            self._answers_open = True
            await self.client.subscribe(f"{topology.ANSWERS.subject(request=self.asker)}.>", cb=self._on_answer)
        yield

    async def _on_answer(self, msg: Msg) -> None:
        request = (msg.headers or {}).get(REQUEST_HEADER, "")
        waiting = self._waiting.get(request)
        if waiting is None or waiting.done():
            return
        try:
            result, _ = await self.open(topology.ANSWERS, msg.data, msg.headers or {})
        except MeshError as error:
            result = RequestFailed(request_id=request, failure=failure_of(error))
        if not waiting.done():
            waiting.set_result(result)

    # -- tables --------------------------------------------------------------------------------------------------

    def table(self, bucket: Bucket[T]) -> Table[T]:
        """The key-value bucket as a typed table."""
        return Table(self, bucket)


def checked(result: Result) -> Result:
    """The result itself. Raise `UserError` or `PermanentError` if it says that the request failed."""
    if isinstance(result, RequestFailed):
        kind = UserError if result.failure.kind == "user" else PermanentError
        raise kind(result.failure.message)
    return result


def _no_connection(url: str, error: Exception | None) -> str:
    where = re.sub(r"//[^@,/]*@", "//", url)  # a password is nobody's business
    if isinstance(error, AuthorizationError) or "authorization" in str(error).lower():
        return f"the nats-server at {where} does not let us in: check nats_user and nats_password, or nats_credentials"
    return f"no nats-server answers at {where} within {CONNECT_PATIENCE:g} s: start one, or set nats_url"


async def _log_error(error: Exception) -> None:
    log.warning("connection to the bus: %s", error or type(error).__name__)
