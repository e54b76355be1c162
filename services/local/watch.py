"""Follows one job from its first event to its end.

| consumes | does |
|---|---|
| `JOB_PROGRESS` and `JOB_PHASES` of the job, from the beginning | folds them into a `JobView`, shows what is new |
| the job's record and the replicas, every second | learns of an end whose event has expired; shows who does what |

It is over when the job is finished and everything written up to then has been shown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from services.local.client import job as job_record
from services.local.health import replicas
from services.local.progress import JobView, measure
from shared import topology
from shared.bus import Bus
from shared.contracts.jobs import JobChanged, JobProgressed
from shared.errors import MeshError, PermanentError, TemporaryError
from shared.tasks import cancelled
from shared.topology import Channel

REFRESH_SECONDS = 1.0

CHANNELS: tuple[Channel[Any], ...] = (topology.JOB_PHASES, topology.JOB_PROGRESS)

Event = JobProgressed | JobChanged


class Show(Protocol):
    """How a job is shown."""

    def news(self, view: JobView, event: Event | None, lines: Sequence[str]) -> None:
        """Something happened. `event` None: it was learnt from the job's record."""

    def refresh(self, view: JobView) -> None:
        """A second has passed."""


async def watch(bus: Bus, job: str, show: Show, *, alive: Callable[[], bool]) -> JobView:
    """Show a job until it is finished and return what is known of it then.

    Raise `UserError` if there is no such job and `PermanentError` once `alive` says that the mesh is gone.
    """
    record = await job_record(bus, job)
    view = JobView(job, steps=record.spec.algorithm.steps, measure=measure(record.spec))
    watcher = _Watcher(bus, view, show)
    try:
        await watcher.until_finished(alive)
    finally:
        await cancelled(watcher.readers)
    return view


class _Watcher:
    def __init__(self, bus: Bus, view: JobView, show: Show) -> None:
        self.readers: list[asyncio.Task[None]] = []
        self._bus = bus
        self._view = view
        self._show = show
        self._held: list[tuple[int, Event]] = []
        """Read and not shown yet, with their places in the stream."""
        self._read_up_to = {channel.name: 0 for channel in CHANNELS}
        self._news = asyncio.Event()

    async def until_finished(self, alive: Callable[[], bool]) -> None:
        self.readers += [asyncio.create_task(self._read(channel)) for channel in CHANNELS]
        refreshed = 0.0
        while not (self._view.finished and await self._all_shown()):
            for event in await self._next_events():
                lines = self._view.progressed(event) if isinstance(event, JobProgressed) else self._view.changed(event)
                self._show.news(self._view, event, lines)
            for reader in self.readers:
                if reader.done():
                    reader.result()
            if time.monotonic() - refreshed >= REFRESH_SECONDS:
                if not alive():
                    raise PermanentError(f"the mesh was stopped; job {self._view.job} goes on at the next `openrl up`")
                await self._refresh()
                refreshed = time.monotonic()
        self._show.refresh(self._view)

    async def _read(self, channel: Channel[Any]) -> None:
        async for delivery in self._bus.follow(channel, job=self._view.job):
            self._held.append((delivery.seq, delivery.message))
            self._read_up_to[channel.name] = delivery.seq
            self._news.set()

    async def _next_events(self) -> list[Event]:
        """What can be shown now, in the order of the stream; nothing after a second without news.

        The channels are read side by side, so an end must wait for the steps before it. Phases are asked for first:
        then every step that came before one of them is among those that are waited for.
        """
        if not self._held:
            await self._wait_for_news()
        try:
            newest = {channel.name: await self._bus.last_place(channel, job=self._view.job) for channel in CHANNELS}
        except TemporaryError:  # the bus is away for a moment
            return []
        while any(self._read_up_to[name] < place for name, place in newest.items()):
            if not await self._wait_for_news():
                return []
        late = newest[topology.JOB_PHASES.name]
        ready = [(place, event) for place, event in self._held if isinstance(event, JobProgressed) or place <= late]
        self._held = [held for held in self._held if held not in ready]
        return [event for _, event in sorted(ready, key=lambda item: item[0])]

    async def _wait_for_news(self) -> bool:
        """Whether something was read within a second."""
        self._news.clear()
        try:
            await asyncio.wait_for(self._news.wait(), REFRESH_SECONDS)
        except TimeoutError:
            return False
        return True

    async def _refresh(self) -> None:
        try:
            self._view.replicas = sorted((await replicas(self._bus)).values(), key=lambda replica: replica.replica)
            record = await job_record(self._bus, self._view.job)
            # What the record says comes after all events up to now, or it would seem to be taken back by them.
            lines = self._view.recorded(record) if await self._all_shown() else []
        except MeshError:  # the bus is away for a moment
            return
        if lines:
            self._show.news(self._view, None, lines)
        self._show.refresh(self._view)

    async def _all_shown(self) -> bool:
        if self._held:
            return False
        try:
            for channel in CHANNELS:
                if self._read_up_to[channel.name] < await self._bus.last_place(channel, job=self._view.job):
                    return False
        except TemporaryError:
            return False
        return True
