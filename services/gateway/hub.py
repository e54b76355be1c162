"""Waiting for results: one subscription for each session in use, and a future for each poll.

| waits for | unblocked by |
|---|---|
| a poll | its result, which wakes it; the end of its time; the stop of the gateway |
| after an interruption of the bus, all polls | the bus: each looks once whether its result came meanwhile |

A result that nobody asks for yet is kept, up to a number of bytes. What this process has not heard, since it was
submitted or answered elsewhere or before a restart, is read from the stream of results, which keeps it for an hour. So
any gateway answers any poll.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.gateway.limits import InFlight
from shared.bus import REQUEST_HEADER, Bus
from shared.errors import TemporaryError
from shared.scans import Stored
from shared.tasks import Tasks

log = logging.getLogger(__name__)

LOOK_AGAIN = 1.0
"""Seconds after which to look a second time for a result that came from elsewhere: it may have been sent, and not yet
stored, while the first look and the subscription were made."""
SPREAD = 0.2
"""Polls that began together end within this part of their time, not at once."""
WATCH_SECONDS = 1.0
OVERHEAD = 512
"""Bytes that a kept result costs beside its body."""


@dataclass
class _Session:
    """A session whose results are listened for."""

    listening: asyncio.Future[Callable[[], Awaitable[None]]]
    """Gives what ends the subscription."""
    used: float
    polls: int = 0


class Hub:
    """The results of the sessions that use this gateway."""

    def __init__(self, bus: Bus, in_flight: InFlight, *, cached_bytes: int, idle_seconds: float) -> None:
        """`in_flight` says what was submitted here; what is answered is taken out of it."""
        self._bus = bus
        self._in_flight = in_flight
        self._cached_bytes = cached_bytes
        self._idle_seconds = idle_seconds
        self._sessions: dict[str, _Session] = {}
        self._waiting: dict[str, list[asyncio.Future[Stored | None]]] = {}
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._kept_bytes = 0
        self.closing = asyncio.Event()
        """Set once the gateway stops."""

    @property
    def waiting(self) -> int:
        """Polls that wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def kept_bytes(self) -> int:
        """Of results that nobody has asked for yet."""
        return self._kept_bytes

    def start(self, tasks: Tasks) -> None:
        """Look after subscriptions."""
        tasks.start("sessions in use", self._watch())

    async def listen(self, session: str) -> None:
        """Hear the results of a session from now on, for a while. Before anything is submitted."""
        found = self._sessions.get(session)
        if found is None:
            listening = asyncio.ensure_future(self._bus.hear_answers(session, self._heard))
            found = self._sessions[session] = _Session(listening, 0.0)
        found.used = time.monotonic()
        if not found.listening.done():
            await asyncio.shield(found.listening)

    async def result(self, session: str, request: str, seconds: float) -> Stored | None:
        """The result of a session's request; None: there was none in so many seconds, or the gateway stops.

        Raise `TemporaryError` if the bus does not answer.
        """
        await self.listen(session)
        if (kept := self._take(request)) is not None:
            return kept
        using = self._sessions[session]
        using.polls += 1
        try:
            return await self._wait(request, seconds * (1 - SPREAD * random.random()))  # noqa: S311 - no secret
        finally:
            using.polls -= 1
            using.used = time.monotonic()

    async def close(self) -> None:
        """End all waiting: whoever polls is told to try again, elsewhere or later."""
        self.closing.set()
        self._look()
        for session in list(self._sessions):
            await self._drop(session)

    # -- waiting -------------------------------------------------------------------------------------------------

    async def _wait(self, request: str, seconds: float) -> Stored | None:
        give_up = time.monotonic() + seconds
        patience = seconds
        if request not in self._in_flight:
            if (found := await self._look_up(request)) is not None:
                return found
            patience = min(LOOK_AGAIN, seconds)
        while not self.closing.is_set():
            found = await self._woken(request, patience) or await self._look_up(request)
            patience = give_up - time.monotonic()
            if found is not None or patience <= 0:
                return found
        return None

    async def _woken(self, request: str, seconds: float) -> Stored | None:
        waiting: asyncio.Future[Stored | None] = asyncio.get_running_loop().create_future()
        others = self._waiting.setdefault(request, [])
        others.append(waiting)
        try:
            async with asyncio.timeout(seconds):
                return await waiting
        except TimeoutError:
            return None
        finally:
            others.remove(waiting)
            if not others and self._waiting.get(request) is others:
                del self._waiting[request]

    async def _look_up(self, request: str) -> Stored | None:
        if self.closing.is_set():
            return None
        found = await self._bus.stored_answer(request)
        if found is not None:
            self._in_flight.remove(request)
        return found

    def _take(self, request: str) -> Stored | None:
        found = self._kept.pop(request, None)
        if found is not None:
            self._kept_bytes -= len(found.body) + OVERHEAD
        return found

    # -- hearing -------------------------------------------------------------------------------------------------

    def _heard(self, result: Stored) -> None:
        request = result.headers.get(REQUEST_HEADER, "")
        self._in_flight.remove(request)
        waiting = [one for one in self._waiting.get(request, ()) if not one.done()]
        for one in waiting:
            one.set_result(result)
        if not waiting and request not in self._kept:
            self._keep(request, result)

    def _keep(self, request: str, result: Stored) -> None:
        self._kept[request] = result
        self._kept_bytes += len(result.body) + OVERHEAD
        while self._kept_bytes > self._cached_bytes:
            self._take(next(iter(self._kept)))

    def _look(self) -> None:
        """Have all polls look for their results, since some may have been missed."""
        for polls in self._waiting.values():
            for poll in polls:
                if not poll.done():
                    poll.set_result(None)

    async def _watch(self) -> None:
        interruptions = self._bus.interruptions
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._bus.interruptions != interruptions and self._bus.connected:
                interruptions = self._bus.interruptions
                self._look()
            idle = time.monotonic() - self._idle_seconds
            for session, using in list(self._sessions.items()):
                if not using.polls and using.used < idle:
                    await self._drop(session)

    async def _drop(self, session: str) -> None:
        using = self._sessions.pop(session)
        try:
            end = await using.listening
        except TemporaryError as error:
            log.warning("results of session %s were not listened for: %s", session, error)
            return
        await end()
