"""The policies that an engine holds: fetched when asked for, kept while used, in turns where there are too few places.

`policy.leaving` decides who makes room; `_settle` is called whenever something has changed, and does what follows from
it: lets requests begin, unloads, gives free places to those in line. A policy that somebody asks for is fetched before
it stands in line, so one that is missing or corrupted takes nobody's place. One that was announced stands there while
it is fetched, so that its place is free by then: it exists, and takes only a place that nobody uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from prometheus_client import Histogram

from services.sampler.engines.base import SamplerEngine
from services.sampler.policy import TERM, Held, leaving
from shared import observe
from shared.contracts.policies import PolicyRef
from shared.errors import TemporaryError
from shared.tasks import Tasks

log = logging.getLogger(__name__)

Fetch = Callable[[PolicyRef], Awaitable[Mapping[str, bytes]]]


class Policies:
    """Sees to it that a request's policy is loaded before and stays until after."""

    def __init__(self, engine: SamplerEngine, fetch: Fetch, tasks: Tasks, seconds: Histogram) -> None:
        """`seconds` observes fetching and loading, without waiting for a place."""
        self._engine, self._fetch, self._tasks, self._seconds = engine, fetch, tasks, seconds
        self._held: dict[PolicyRef, Held] = {}
        self._closed: frozenset[PolicyRef] = frozenset()
        self._waiting: dict[PolicyRef, list[asyncio.Future[None]]] = {}
        """Requests that have not begun."""
        self._bringing: set[PolicyRef] = set()
        """Policies that are fetched, stand in line or are loaded."""
        self._announced: set[PolicyRef] = set()
        """Policies that are loaded ahead."""
        self._line: dict[PolicyRef, asyncio.Future[bool]] = {}
        """Policies that wait for a place, in order; the result says if they are still wanted."""
        self._loading = 0
        self._unloading = 0
        self._fetches = asyncio.Semaphore(engine.capacity)  # no more files in memory than there are places
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.asynccontextmanager
    async def using(self, policy: PolicyRef | None) -> AsyncIterator[None]:
        """Hold a policy loaded inside the block; None: the base model, which always is.

        Raise `UserError` for an unknown policy, `PermanentError` for one whose files are damaged.
        """
        if policy is None:
            yield
            return
        await self._enter(policy)
        try:
            yield
        finally:
            self._leave(policy)

    async def prefetch(self, policy: PolicyRef) -> None:
        """Load an announced policy if there is a place for it without anybody waiting or being closed."""
        coming = len(self._bringing) + 1
        wanted = len(self._held) + coming - self._engine.capacity
        if len(leaving(self._held, wanted, time.monotonic()).now) < wanted:
            return
        self._announced.add(policy)
        try:
            async with self.using(policy):
                pass
        finally:
            self._announced.discard(policy)

    # -- requests ------------------------------------------------------------------------------------------------

    async def _enter(self, policy: PolicyRef) -> None:
        if policy in self._held and policy not in self._closed:
            self._begin(policy)
            return
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(policy, []).append(begun)
        self._settle()
        try:
            await begun
        except asyncio.CancelledError:
            if begun.done() and not begun.cancelled() and begun.exception() is None:
                self._leave(policy)  # it began in the same moment
            self._settle()
            raise

    def _begin(self, policy: PolicyRef) -> None:
        self._held[policy].users += 1
        self._held[policy].used = time.monotonic()

    def _leave(self, policy: PolicyRef) -> None:
        self._held[policy].users -= 1
        self._held[policy].used = time.monotonic()
        self._settle()

    def _admit(self, policy: PolicyRef) -> None:
        """Let all requests begin that wait for a policy in memory."""
        for begun in self._waiting.pop(policy, []):
            if not begun.done():
                self._begin(policy)
                begun.set_result(None)

    def _refuse(self, policy: PolicyRef, error: Exception) -> None:
        for begun in self._waiting.pop(policy, []):
            if not begun.done():
                begun.set_exception(error)

    def _wanted(self, policy: PolicyRef) -> bool:
        return any(not begun.done() for begun in self._waiting.get(policy, []))

    # -- places --------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Do what follows from what has changed."""
        for policy, place in list(self._line.items()):
            if not self._wanted(policy):
                self._line.pop(policy)
                place.set_result(False)
        self._make_room()
        for policy in [policy for policy in self._waiting if policy in self._held.keys() - self._closed]:
            self._admit(policy)
        for policy in [policy for policy in self._waiting if policy not in self._held.keys() | self._bringing]:
            self._bring_if_wanted(policy)

    def _make_room(self) -> None:
        now = time.monotonic()
        used = len(self._held) + self._loading
        plan = leaving(self._held, len(self._line) + used - self._engine.capacity, now)
        self._closed = plan.closed
        for policy in plan.now:
            del self._held[policy]
            self._unloading += 1
            self._tasks.start(f"unload {policy}", self._unload(policy))
        if self._timer is not None:
            self._timer.cancel()
        wait = None if plan.again is None else max(0.0, plan.again - now)
        self._timer = None if wait is None else asyncio.get_running_loop().call_later(wait, self._settle)
        self._give_places()

    def _give_places(self) -> None:
        free = self._engine.capacity - len(self._held) - self._loading - self._unloading
        for policy in list(self._line)[: max(0, free)]:
            self._loading += 1
            self._line.pop(policy).set_result(True)

    def _bring_if_wanted(self, policy: PolicyRef) -> None:
        if not self._wanted(policy):
            self._waiting.pop(policy)
            return
        self._bringing.add(policy)
        self._tasks.start(f"load {policy}", self._bring(policy))

    async def _bring(self, policy: PolicyRef) -> None:
        try:
            async with self._fetches:
                await self._fetch_and_load(policy)
        except asyncio.CancelledError:
            self._refuse(policy, TemporaryError("the sampler stops"))
            raise
        except Exception as error:  # whatever it was, those who asked are told, each through its own worker
            self._refuse(policy, error)
        finally:
            self._bringing.discard(policy)
            self._settle()

    async def _fetch_and_load(self, policy: PolicyRef) -> None:
        watch = observe.Stopwatch()
        place = self._stand_in_line(policy) if policy in self._announced else None
        try:
            files = await self._fetch(policy)
        except BaseException:
            if place is not None:
                self._step_out_of_line(policy, place)
            raise
        watch.lap("fetch")
        if await (place or self._stand_in_line(policy)):
            watch.lap("place")
            await self._load(policy, files, watch)

    def _stand_in_line(self, policy: PolicyRef) -> asyncio.Future[bool]:
        place: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._line[policy] = place
        self._settle()
        return place

    def _step_out_of_line(self, policy: PolicyRef, place: asyncio.Future[bool]) -> None:
        if self._line.pop(policy, None) is None and place.result():
            self._loading -= 1

    async def _load(self, policy: PolicyRef, files: Mapping[str, bytes], watch: observe.Stopwatch) -> None:
        try:
            await self._engine.load_policy(policy, files)
        finally:
            self._loading -= 1
        watch.lap("load")
        now = time.monotonic()
        seconds = watch.seconds["fetch"] + watch.seconds["load"]
        self._seconds.observe(seconds)
        self._held[policy] = Held(used=now, until=now + TERM * seconds)
        named = {"run": policy.run, "policy": policy, observe.SECONDS: watch.seconds}
        log.info("policy %s is ready", policy, extra=named)
        self._admit(policy)

    async def _unload(self, policy: PolicyRef) -> None:
        try:
            await self._engine.unload_policy(policy)
        except TemporaryError:  # the engine is being stopped
            return
        finally:
            self._unloading -= 1
            self._settle()
