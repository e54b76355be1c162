"""How full the bus is: the size of each stream, and what waits in each queue and for how long.

Seen from the server, so it is known also of a queue that nobody serves at the moment. A queue is a pool's requests, all
groups to be played or scored, or the operations of all runs of a base model that no trainer holds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nats.errors import Error as NatsError
from nats.js import api
from nats.js import errors as js_errors

from shared import topology
from shared.bus import Bus
from shared.errors import TemporaryError
from shared.topology import Channel

MOST_LOOKS = 64
"""Messages of a queue that are looked at to find the oldest one. Where more lines wait than that, it may be older."""
_PAGE = 256
"""Consumers in one answer of the server."""


@dataclass(frozen=True)
class StreamLoad:
    """One stream, or the one behind a bucket."""

    name: str
    messages: int
    bytes: int
    limit: int
    """Bytes; 0: only the server's."""
    published: int
    """Messages since it was made."""


@dataclass(frozen=True)
class QueueLoad:
    """One queue."""

    channel: str
    name: str
    """Base model, or empty where all messages of a channel go to the same replicas."""
    waiting: int
    """Messages that nobody has taken."""
    in_work: int
    """Messages that were given out and have not been acknowledged. Where all replicas have gone, these wait too."""
    oldest: float
    """Seconds that the oldest of those that wait has been there; 0: none waits."""


@dataclass(frozen=True)
class BusLoad:
    """Everything at one time."""

    streams: Sequence[StreamLoad]
    queues: Sequence[QueueLoad]
    storage: int
    """Bytes on disk, of all streams."""
    storage_limit: int
    """Bytes that the account may store; without such a limit, what all streams together may hold."""


async def measure(bus: Bus, open_runs: Mapping[str, str]) -> BusLoad:
    """Ask the server. `open_runs`: base model of each run that is not closed. Raise `TemporaryError`."""
    try:
        account = await bus.stream_context.account_info()
        queues = [
            *await _work_queue(bus, topology.SAMPLES, split=True),
            *await _work_queue(bus, topology.GROUPS, split=False),
            *await _work_queue(bus, topology.PLAYED, split=False),
            *await _unclaimed(bus, open_runs),
        ]
        streams = await _streams(bus)
        limit = account.limits.max_storage
        return BusLoad(streams, queues, account.storage, limit if limit > 0 else sum(each.limit for each in streams))
    except (NatsError, js_errors.Error, TimeoutError, OSError) as error:
        raise TemporaryError(f"the bus does not tell its load: {error or type(error).__name__}") from None


async def _streams(bus: Bus) -> list[StreamLoad]:
    found: list[StreamLoad] = []
    while page := await bus.stream_context.streams_info(offset=len(found)):
        found += [
            StreamLoad(
                name=info.config.name or "",
                messages=info.state.messages,
                bytes=info.state.bytes,
                limit=max(0, info.config.max_bytes or 0),
                published=info.state.last_seq,
            )
            for info in page
        ]
    return found


async def _work_queue(bus: Bus, channel: Channel[Any], *, split: bool) -> list[QueueLoad]:
    """The queues of a channel: one for each first part of its subjects, or all together.

    A message leaves a work queue when it is acknowledged, so what is there and not given out waits, be there a consumer
    for it or not.
    """
    stream = channel.stream.name
    there = await _subjects(bus, stream, channel.below)
    consumers = await _consumers(bus, stream)
    messages: dict[str, int] = defaultdict(int, {} if split else {"": 0})
    for subject, count in there.items():
        messages[channel.part(subject) if split else ""] += count
    in_work: dict[str, int] = defaultdict(int)
    unseen: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for consumer in consumers:
        pattern = consumer.config.filter_subject or channel.below
        name = channel.part(pattern) if split else ""
        messages[name] += 0  # it has a queue, if an empty one
        in_work[name] += consumer.num_ack_pending or 0
        if consumer.num_pending:
            unseen[name].append((pattern, consumer.delivered.stream_seq if consumer.delivered else 0))
    patterns = [consumer.config.filter_subject or channel.below for consumer in consumers]
    for subject in there:
        if not any(_covers(pattern, subject) for pattern in patterns):
            unseen[channel.part(subject) if split else ""].append((subject, 0))
    return [
        QueueLoad(
            channel=channel.name,
            name=name,
            waiting=max(0, count - in_work[name]),
            in_work=in_work[name],
            oldest=await _oldest(bus, stream, unseen[name]),
        )
        for name, count in messages.items()
    ]


async def _unclaimed(bus: Bus, open_runs: Mapping[str, str]) -> list[QueueLoad]:
    """By base model, the operations of runs that no trainer holds. A log begins behind the run's last snapshot."""
    held = {key[1] for key in await bus.table(topology.LEASES).keys() if key[0] == "run"}
    there = await _subjects(bus, topology.TRAIN.name, topology.OPERATIONS.below)
    waiting = dict.fromkeys(open_runs.values(), 0)
    logs: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for run, base_model in open_runs.items():
        subject = topology.OPERATIONS.subject(run=run)
        if run not in held and there.get(subject):
            waiting[base_model] += there[subject]
            logs[base_model].append((subject, 0))
    name = topology.OPERATIONS.name
    return [
        QueueLoad(name, model, count, 0, await _oldest(bus, topology.TRAIN.name, logs[model]))
        for model, count in waiting.items()
    ]


async def _oldest(bus: Bus, stream: str, behind: Sequence[tuple[str, int]]) -> float:
    """Age of the oldest message that lies, on one of some subjects, behind a place."""
    ages = [0.0]
    for subject, place in behind[:MOST_LOOKS]:
        try:
            found = await bus.stream_context.get_msg(stream, seq=place + 1, subject=subject, next=True)
        except js_errors.NotFoundError:
            continue  # taken meanwhile
        if found.time is not None:
            ages.append(time.time() - found.time.timestamp())
    return max(ages)


async def _subjects(bus: Bus, stream: str, pattern: str) -> dict[str, int]:
    return (await bus.stream_context.stream_info(stream, subjects_filter=pattern)).state.subjects or {}


async def _consumers(bus: Bus, stream: str) -> list[api.ConsumerInfo]:
    found: list[api.ConsumerInfo] = []
    while True:
        page = await bus.stream_context.consumers_info(stream, offset=len(found))
        found += page
        if len(page) < _PAGE:
            return found


def _covers(pattern: str, subject: str) -> bool:
    """Whether a consumer with this filter is given a subject. Ours have a wildcard at the end, if any."""
    if pattern.endswith(".>"):
        return subject.startswith(pattern[:-1])
    if pattern.endswith(".*"):
        return subject.rpartition(".")[0] == pattern[:-2]
    return pattern == subject
