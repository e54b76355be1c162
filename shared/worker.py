"""The one place that takes work from a queue, acknowledges it, and catches everything.

    handler returns                 → ack
    TemporaryError                  → given out again after a growing delay; on the last delivery as below
    PermanentError, undecodable     → kept in DEAD with the reason, taken off the queue, the asker gets the failure
    any other exception (a defect)  → given out again; on the last delivery as above
    the process ends                → given out again, as often as `shared.chances` allows, and then as above
    cancelled, while stopping       → handed back at once, for another replica

While a handler runs, the server is told so, so long work is not given to somebody else. `max_pending` of the consumer
and `concurrency` here bound what is out. How messages are fetched, and whose turn it is, is in `shared.queues`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import errors as js_errors
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared import observe
from shared.bus import BLOB_HEADER, REQUEST_HEADER, Bus, Delivery
from shared.chances import Chances, TooOften
from shared.errors import MeshError, PermanentError, TemporaryError, failure_of
from shared.queues import queue_of
from shared.scans import Stored
from shared.tasks import cancelled
from shared.topology import Consumer, Kept

T = TypeVar("T")
log = logging.getLogger(__name__)

DEFECT_DELAY = 1.0
MOST_DELAY = 30.0
SECONDS_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300)


class WorkerMetrics:
    """What every worker counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.handled = Counter(
            "openrl_worker_messages_total", "Messages by what became of them", ["channel", "outcome"], registry=registry
        )
        self.running = Gauge("openrl_worker_running", "Messages in work", ["channel"], registry=registry)
        self.seconds = Histogram(
            "openrl_worker_seconds", "Time in the handler", ["channel"], buckets=SECONDS_BUCKETS, registry=registry
        )


class Worker(Generic[T]):
    """Takes messages of one consumer and gives them to a handler, several at a time."""

    def __init__(
        self,
        bus: Bus,
        consumer: Consumer[T],
        handle: Callable[[Delivery[T]], Awaitable[None]],
        *,
        concurrency: int,
        metrics: WorkerMetrics,
        on_too_often: Callable[[Delivery[T], TooOften], Awaitable[None]] | None = None,
    ) -> None:
        """`on_too_often` tells whoever waits for a message that it will not even be tried again."""
        self._bus = bus
        self._consumer = consumer
        self._handle = handle
        self._on_too_often = on_too_often
        self._queue = queue_of(bus, consumer)
        self._chances = Chances(bus, consumer)
        self._slots = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._metrics = metrics
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Messages in work."""
        return len(self._running)

    async def run(self) -> None:
        """Take and handle messages until `stop`."""
        await self._queue.open()
        self._idle.clear()
        try:
            while not self._stopping.is_set():
                await self._take_some()
        finally:
            self._idle.set()
            await self._queue.close()

    async def stop(self, grace: float) -> None:
        """Take nothing more; give what runs `grace` seconds to finish, then hand it back."""
        self._stopping.set()
        await self._idle.wait()
        if self._running:
            await asyncio.wait(set(self._running), timeout=grace)
        await cancelled(set(self._running))

    async def _take_some(self) -> None:
        if self._slots.locked():
            await self._a_slot_or_the_end()
            return
        try:
            messages = await self._queue.take(max(1, self._concurrency - len(self._running)))
        except (NatsError, js_errors.Error, TimeoutError) as error:
            # The server is away, or has lost the consumer with its disk: wait, and make sure that it is there.
            log.warning("taking work from %s: %s, trying again", self._consumer.name, error or type(error).__name__)
            await asyncio.sleep(0.5)
            with contextlib.suppress(NatsError, js_errors.Error, TimeoutError):
                await self._queue.open()
            return
        for message in messages:
            await self._slots.acquire()
            task = asyncio.create_task(self._process(message), name=f"worker:{self._consumer.name}")
            self._running.add(task)
            task.add_done_callback(partial(self._done, message.subject))

    async def _a_slot_or_the_end(self) -> None:
        slot = asyncio.ensure_future(self._slots.acquire())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait([slot, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        slot.cancel()
        if slot.done() and not slot.cancelled():
            self._slots.release()

    def _done(self, subject: str, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._queue.ended(subject)
        self._slots.release()
        if not task.cancelled() and (error := task.exception()):
            log.error("an outcome could not be reported; the message will come again", exc_info=error)

    async def _process(self, msg: Msg) -> None:
        channel = self._consumer.channel.name
        headers = msg.headers or {}
        alive = asyncio.create_task(self._keep_alive(msg))
        started = time.monotonic()
        self._metrics.running.labels(channel).inc()
        try:
            with contextlib.ExitStack() as context:
                context.enter_context(observe.traced(headers))
                context.enter_context(observe.bound(request=headers.get(REQUEST_HEADER, "")))
                outcome = await self._attempt(msg, headers, context)
            self._metrics.handled.labels(channel, outcome).inc()
        finally:
            alive.cancel()
            self._metrics.running.labels(channel).dec()
            self._metrics.seconds.labels(channel).observe(time.monotonic() - started)

    async def _attempt(self, msg: Msg, headers: dict[str, str], context: contextlib.ExitStack) -> str:
        """Handle one message and settle it; what became of it, for the metrics."""
        try:
            delivery = await self._open(msg, headers)
            context.enter_context(observe.bound(**_ids(delivery.message)))
            await self._try(delivery)
        except asyncio.CancelledError:
            await msg.nak()
            return "handed_back"
        except PermanentError as error:
            return await self._give_up(msg, headers, error)
        except Exception as error:  # the one broad catch of the mesh: see the module's docstring
            return await self._again(msg, headers, error)
        await msg.ack()
        await self._forget_blob(headers)
        return "done"

    async def _try(self, delivery: Delivery[T]) -> None:
        try:
            async with self._chances.given(delivery):
                await self._handle(delivery)
        except TooOften as error:
            if self._on_too_often is not None:
                await self._on_too_often(delivery, error)
            raise

    async def _open(self, msg: Msg, headers: dict[str, str]) -> Delivery[T]:
        message, json = await self._bus.open(self._consumer.channel, msg.data, headers)
        meta = msg.metadata
        return Delivery(message, msg.subject, meta.sequence.stream, meta.num_delivered, json, headers)

    async def _again(self, msg: Msg, headers: dict[str, str], error: Exception) -> str:
        if not isinstance(error, MeshError):
            log.error("handling %s failed", msg.subject, exc_info=error)
        deliveries = msg.metadata.num_delivered
        if self._consumer.is_last(error, deliveries):
            return await self._give_up(msg, headers, error)
        delay = error.delay if isinstance(error, TemporaryError) else DEFECT_DELAY
        await msg.nak(delay=min(MOST_DELAY, delay * 1.5 ** (deliveries - 1)))
        return "again"

    async def _give_up(self, msg: Msg, headers: dict[str, str], error: Exception) -> str:
        # On a work queue a message stays behind even after its last delivery: it must be buried, then terminated.
        stream = self._consumer.channel.stream.name
        why = failure_of(error).message
        meta = msg.metadata
        await self._bus.bury(stream, msg.subject, msg.data, headers, why, meta.num_delivered)
        await self._bus.refuse(Stored(msg.subject, meta.sequence.stream, msg.data, headers), error)
        await msg.term()
        return "dead"

    async def _forget_blob(self, headers: dict[str, str]) -> None:
        if BLOB_HEADER in headers and self._consumer.channel.stream.kept is Kept.UNTIL_DONE:
            with contextlib.suppress(TemporaryError):
                await self._bus.discard_body(headers)

    async def _keep_alive(self, msg: Msg) -> None:
        while True:
            await asyncio.sleep(self._consumer.ack_wait / 3)
            with contextlib.suppress(NatsError):
                await msg.in_progress()


def _ids(message: object) -> dict[str, str]:
    """What log lines about a message should name."""
    named = {name: getattr(message, name, None) for name in ("job", "run", "group")}
    return {name: str(value) for name, value in named.items() if value is not None}
