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
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js import JetStreamContext, api
from nats.js import errors as js_errors

from shared.bus import Bus
from shared.topology import LINE, Consumer
from shared.turns import next_line

log = logging.getLogger(__name__)

FETCH_SECONDS = 1.0
"""How long a replica waits for messages before it looks whether it is to stop, or what lies in the stream."""
PULL_SECONDS = 2.0
"""How long the server may take to answer a request that does not wait."""
FORGOTTEN_SECONDS = 60.0
"""After which the server forgets the consumer of a line that nobody asks for. One with messages is asked for."""
LINES_AT_ONCE = 32
"""Lines that are asked at the same time."""
_STATUS = "Status"
_NO_CONSUMER = "503"
_TOO_MANY_CONSUMERS = 10026


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


@dataclass
class _Pull:
    """A request for messages of one line that has been sent."""

    missing: int
    """Messages that it has not brought."""
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    """All have come, or the server has said that there are no more."""
    refusal: str = ""


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
        self._make_room_at = 0.0
        self._inbox = bus.client.new_inbox()
        self._subscriptions: list[Subscription] = []
        self._arrived: list[Msg] = []
        self._pulls: dict[str, _Pull] = {}

    async def open(self) -> None:
        """See `Queue.open`."""
        self._made.clear()
        self._look_at = 0.0
        if not self._subscriptions:
            client = self._bus.client
            self._subscriptions = [
                await client.subscribe(self._consumer.notices, cb=self._on_notice),
                await client.subscribe(f"{self._consumer.notices}.*", cb=self._on_notice),
                await client.subscribe(f"{self._inbox}.>", cb=self._on_answer),
            ]

    async def take(self, free: int) -> list[Msg]:
        """See `Queue.take`."""
        if time.monotonic() >= self._look_at:
            await self._look()
        while self._waiting and not self._arrived:
            await asyncio.gather(*(self._ask(line, count) for line, count in self._next_lines(free)))
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

    def _next_lines(self, free: int) -> list[tuple[str, int]]:
        """Choose lines for all free places, as if each had all that it is asked for. They no longer count as waiting.

        What comes while they are asked is noticed again.
        """
        self._news.clear()
        held = self._held.copy()
        chosen: list[tuple[str, int]] = []
        while free and self._waiting and len(chosen) < LINES_AT_ONCE:
            line, count = next_line(self._waiting, held, free)
            free -= count
            held[line] += count
            self._turn += 1
            self._turns[line] = self._turn
            del self._waiting[line]
            chosen.append((line, count))
        return chosen

    async def _ask(self, line: str, count: int) -> None:
        """Ask a line for messages that are there now."""
        if line not in self._made and not await self._make(line):
            return  # it is looked at again soon
        self._made[line] = time.monotonic()
        pull = await self._pull(line, count)
        if pull.refusal == _NO_CONSUMER:
            del self._made[line]
        if not pull.missing or pull.refusal == _NO_CONSUMER:
            self._notice(line)

    async def _pull(self, line: str, count: int) -> _Pull:
        pull = self._pulls[line] = _Pull(count)
        self._turn += 1
        # The answer tells by its subject which line, and which of our requests, it is about.
        reply = f"{self._inbox}.{self._turn}.{line}"
        consumer = self._consumer.line(line).name
        request = json.dumps({"batch": count, "no_wait": True}).encode()
        try:
            await self._bus.client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer}", request, reply=reply)
            async with asyncio.timeout(PULL_SECONDS):
                await pull.answered.wait()
        except TimeoutError:
            if pull.missing == count:
                raise
        finally:
            del self._pulls[line]
        return pull

    async def _on_answer(self, message: Msg) -> None:
        status = (message.headers or {}).get(_STATUS, "")
        if status and not message.reply:
            line = message.subject.removeprefix(f"{self._inbox}.").partition(".")[2]
            if (pull := self._pulls.get(line)) is not None:
                pull.refusal = status
                pull.answered.set()
            return
        # A message that comes late, after its request was given up, is work like any other.
        self._arrived.append(message)
        if (pull := self._pulls.get(message.subject)) is not None:
            pull.missing -= 1
            if pull.missing <= 0:
                pull.answered.set()

    # -- consumers -----------------------------------------------------------------------------------------------

    async def _make(self, line: str) -> bool:
        """Make a line's consumer; whether it is there. The server takes no more than so many for a stream."""
        forgotten = None if line == self._consumer.subject else FORGOTTEN_SECONDS
        config = _config(self._consumer.line(line), forgotten)
        for _ in range(2):
            try:
                await self._bus.stream_context.add_consumer(self._stream, config)
                return True
            except js_errors.APIError as error:
                if error.err_code != _TOO_MANY_CONSUMERS:
                    raise
            await self._make_room()
        return False

    async def _make_room(self) -> None:
        """Remove the consumers of all lines without messages, rather than wait until the server forgets them."""
        if time.monotonic() < self._make_room_at:
            return
        self._make_room_at = time.monotonic() + FETCH_SECONDS
        context = self._bus.stream_context
        idle: list[str] = []
        offset = 0
        while page := await context.consumers_info(self._stream, offset=offset):
            idle += [found.name for found in page if _is_empty_line(found)]
            offset += len(page)
        log.info("%d consumers of empty lines of %s make room for others", len(idle), self._stream)
        for name in idle:
            with contextlib.suppress(js_errors.NotFoundError):  # another replica was faster
                await context.delete_consumer(self._stream, name)


def _is_empty_line(found: api.ConsumerInfo) -> bool:
    return LINE in found.name and not (found.num_pending or found.num_ack_pending)


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
