"""How a replica fetches messages of a work queue: from one line in order, or from a line for each owner in turn.

A single line is a durable pull consumer with a request that waits at the server.

Where owners have lines of their own (`Consumer.lines`), each has a durable consumer, made when its first message is
seen and forgotten by the server when nobody has asked for it for a while. A replica hears from the stream which lines
get messages, and looks at the stream itself from time to time: for what was there before, what was handed back, and
what was in work in a replica that died. Then it asks one line after the other, never waiting at one that is empty;
`shared.turns` chooses. So an owner waits for the others' present requests, and not for their backlogs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from typing import Any, Protocol

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js import JetStreamContext, api
from nats.js import errors as js_errors

from shared.bus import Bus
from shared.topology import Consumer
from shared.turns import next_line

FETCH_SECONDS = 1.0
"""How long a replica waits for messages before it looks whether it is to stop, or what lies in the stream."""
PULL_SECONDS = 2.0
"""How long the server may take to answer a request that does not wait."""
FORGOTTEN_SECONDS = 600.0
"""After which the server forgets the consumer of a line that nobody asks for. One with messages is asked for."""
_STATUS = "Status"
_NO_CONSUMER = "503"


class Queue(Protocol):
    """Where a worker gets its messages."""

    async def open(self) -> None:
        """Make sure that the consumer is there, and begin; again after an error. Raise what the NATS client raises."""

    async def take(self, free: int) -> list[Msg]:
        """Up to `free` messages, as soon as there are any; none if none came. Raise what the NATS client raises."""

    def ended(self, subject: str) -> None:
        """A message of this subject is no longer in work."""

    async def close(self) -> None:
        """End."""


def queue_of(bus: Bus, consumer: Consumer[Any]) -> Queue:
    """The queue of a consumer."""
    return Lines(bus, consumer) if consumer.lines else SingleLine(bus, consumer)


class SingleLine:
    """All messages in their order."""

    def __init__(self, bus: Bus, consumer: Consumer[Any]) -> None:
        self._bus = bus
        self._consumer = consumer
        self._subscription: JetStreamContext.PullSubscription | None = None

    async def open(self) -> None:
        """See `Queue.open`."""
        await self._bus.stream_context.add_consumer(self._consumer.channel.stream.name, _config(self._consumer))
        old, self._subscription = (
            self._subscription,
            await self._bus.stream_context.pull_subscribe_bind(
                consumer=self._consumer.name, stream=self._consumer.channel.stream.name
            ),
        )
        await _unsubscribe(old)

    async def take(self, free: int) -> list[Msg]:
        """See `Queue.take`."""
        assert self._subscription is not None, "not open"
        try:
            return await self._subscription.fetch(free, timeout=FETCH_SECONDS)
        except TimeoutError:  # nats-py's own is one of these too
            return []

    def ended(self, subject: str) -> None:
        """See `Queue.ended`."""

    async def close(self) -> None:
        """See `Queue.close`."""
        await _unsubscribe(self._subscription)


class Lines:
    """A line for each owner, in turn."""

    def __init__(self, bus: Bus, consumer: Consumer[Any]) -> None:
        self._bus = bus
        self._consumer = consumer
        self._stream = consumer.channel.stream.name
        self._waiting: dict[str, int] = {}
        """Lines that may have messages, and the number of their last turn."""
        self._turns: Counter[str] = Counter()
        self._turn = 0
        self._held: Counter[str] = Counter()
        self._made: dict[str, float] = {}
        """Lines whose consumers are there, and when they were last asked."""
        self._news = asyncio.Event()
        self._look_at = 0.0
        self._inbox = bus.client.new_inbox()
        self._subscriptions: list[Subscription] = []
        self._arrived: list[Msg] = []
        self._awaited = 0
        self._answered = asyncio.Event()
        self._refusal = ""

    async def open(self) -> None:
        """See `Queue.open`."""
        self._made.clear()
        self._look_at = 0.0
        if not self._subscriptions:
            client = self._bus.client
            self._subscriptions = [
                await client.subscribe(self._consumer.notices, cb=self._on_notice),
                await client.subscribe(f"{self._consumer.notices}.*", cb=self._on_notice),
                await client.subscribe(f"{self._inbox}.*", cb=self._on_answer),
            ]
        await self._make(self._consumer.subject)

    async def take(self, free: int) -> list[Msg]:
        """See `Queue.take`."""
        if time.monotonic() >= self._look_at:
            await self._look()
        while self._waiting and not self._arrived:
            await self._ask(*next_line(self._waiting, self._held, free))
        if not self._arrived:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._look_at - time.monotonic())):
                    await self._news.wait()
            return []
        arrived, self._arrived = self._arrived, []
        self._held.update(message.subject for message in arrived)
        return arrived

    def ended(self, subject: str) -> None:
        """See `Queue.ended`."""
        self._held[subject] -= 1
        if not self._held[subject]:
            del self._held[subject]

    async def close(self) -> None:
        """See `Queue.close`."""
        for subscription in self._subscriptions:
            await _unsubscribe(subscription)
        for message in self._arrived:
            with contextlib.suppress(NatsError):
                await message.nak()

    async def _look(self) -> None:
        """Find the lines that have messages in the stream, be they in work or not."""
        self._look_at = time.monotonic() + FETCH_SECONDS
        self._news.clear()
        info = await self._bus.stream_context.stream_info(self._stream, subjects_filter=self._consumer.lines)
        there = info.state.subjects or {}
        self._turns = Counter({name: turn for name, turn in self._turns.items() if name in there})
        old = time.monotonic() - FORGOTTEN_SECONDS / 2
        self._made = {name: asked for name, asked in self._made.items() if asked > old}
        for line in (self._consumer.subject, *there):
            self._notice(line)

    def _notice(self, line: str) -> None:
        self._waiting.setdefault(line, self._turns[line])
        self._news.set()

    async def _on_notice(self, notice: Msg) -> None:
        self._notice(self._consumer.noticed(notice.subject))

    async def _ask(self, line: str, count: int) -> None:
        """Ask a line for messages that are there now."""
        self._turn += 1
        self._turns[line] = self._turn
        del self._waiting[line]  # before asking: what comes from now on is noticed
        self._news.clear()
        if line not in self._made:
            await self._make(line)
        self._made[line] = time.monotonic()
        if await self._pull(self._consumer.line(line).name, count):
            self._notice(line)

    async def _make(self, line: str) -> None:
        config = _config(self._consumer.line(line), None if line == self._consumer.subject else FORGOTTEN_SECONDS)
        await self._bus.stream_context.add_consumer(self._stream, config)
        self._made[line] = time.monotonic()

    async def _pull(self, consumer: str, count: int) -> bool:
        """Let up to `count` messages arrive; whether there may be more."""
        self._awaited, self._refusal = count, ""
        self._answered.clear()
        reply = f"{self._inbox}.{self._turn}"
        request = json.dumps({"batch": count, "no_wait": True}).encode()
        await self._bus.client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer}", request, reply=reply)
        try:
            async with asyncio.timeout(PULL_SECONDS):
                await self._answered.wait()
        except TimeoutError:
            if self._awaited == count:
                raise
        if self._refusal == _NO_CONSUMER:
            raise js_errors.NotFoundError(description=f"consumer {consumer} is not there")
        return not self._awaited

    async def _on_answer(self, message: Msg) -> None:
        # A message that comes late, after its request was given up, is work like any other.
        status = (message.headers or {}).get(_STATUS, "")
        if status and not message.reply:
            if message.subject != f"{self._inbox}.{self._turn}":
                return
            self._refusal = status
            self._answered.set()
            return
        self._arrived.append(message)
        self._awaited -= 1
        if self._awaited <= 0:
            self._answered.set()


def _config(consumer: Consumer[Any], forgotten: float | None = None) -> api.ConsumerConfig:
    return api.ConsumerConfig(
        durable_name=consumer.name,
        filter_subject=consumer.subject,
        ack_policy=api.AckPolicy.EXPLICIT,
        ack_wait=consumer.ack_wait,
        max_ack_pending=consumer.max_pending,
        inactive_threshold=forgotten,
    )


async def _unsubscribe(subscription: Any) -> None:
    if subscription is not None:
        with contextlib.suppress(NatsError):
            await subscription.unsubscribe()
