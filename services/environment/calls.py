"""Calls into other people's code: in threads, so that a slow one holds up nobody else.

Each call has a thread of its own, so there are at most as many as episodes in play, and one that hangs keeps no other
waiting. A thread cannot be ended from outside: a call that is given up goes on in its daemon thread, which does not
delay the end of the process, and is counted. When too many calls of one environment hang, its further ones are refused
until some have come back, so what can pile up is bounded. (Code that hangs inside a C extension without releasing the
interpreter lock stops the whole process; to keep that apart takes a process of its own.)
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from prometheus_client import Gauge

from shared.errors import MeshError, UserError
from shared.tasks import Tasks

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
log = logging.getLogger(__name__)


class Calls:
    """Runs functions in daemon threads of their own."""

    def __init__(self, *, max_stuck: int, stuck: Gauge) -> None:
        self._max_stuck = max_stuck
        self._stuck: Counter[str] = Counter()
        self._gauge = stuck

    async def run(self, environment: str, what: str, function: Callable[..., T], *args: Any) -> T:
        """Call `function` and return what it does.

        Raise the errors of the mesh as they are and everything else as a `UserError` that names environment and
        `what`. Cancelling gives the call up.
        """
        if self._stuck[environment] >= self._max_stuck:
            raise UserError(
                f"environment {environment!r} has {self._stuck[environment]} calls that hang and is not called again "
                "before some of them come back: mend what hangs, and restart the environment service"
            )
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        outcome.add_done_callback(lambda done: self._count(environment, 1) if done.cancelled() else None)
        report = _reporter(functools.partial(self._settle, environment, outcome))
        call = functools.partial(function, *args)
        # All of it in the caller's context: what is logged about a failure carries the ids of the group.
        work = functools.partial(contextvars.copy_context().run, _work, environment, what, call, report)
        threading.Thread(target=work, name=f"environment:{environment}", daemon=True).start()
        return await outcome

    def _settle(self, environment: str, outcome: asyncio.Future[T], value: T, error: BaseException | None) -> None:
        if outcome.cancelled():
            self._count(environment, -1)
        elif error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(value)

    def _count(self, environment: str, change: int) -> None:
        self._stuck[environment] += change
        self._gauge.labels(environment).set(self._stuck[environment])


def _work(
    environment: str, what: str, call: Callable[[], Any], report: Callable[[Any, BaseException | None], None]
) -> None:
    """The whole life of a thread."""
    try:
        report(call(), None)
    except MeshError as error:
        report(None, error)
    except BaseException as error:  # a thread has nobody above it who would see it
        log.warning("environment %s failed in %s", environment, what, exc_info=error)
        report(None, UserError(f"environment {environment!r} raised {type(error).__name__} in {what}: {error}"))


def _reporter(settle: Callable[[Any, BaseException | None], None]) -> Callable[[Any, BaseException | None], None]:
    """Carries an outcome from a thread to the present event loop, if that still runs."""
    loop = asyncio.get_running_loop()

    def report(value: Any, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(settle, value, error)

    return report


class Once(Generic[K, T]):
    """Makes a thing for each key once, for all who ask at the same time. A failure is not remembered.

    Keeps the `limit` things that were asked for last.
    """

    def __init__(self, tasks: Tasks, limit: int = 64) -> None:
        self._tasks = tasks
        self._limit = limit
        self._made: dict[K, asyncio.Future[T]] = {}

    async def get(self, key: K, make: Callable[[], Any]) -> T:
        """The thing for `key`; `make()` gives a coroutine that makes it."""
        made = self._made.pop(key, None)
        if made is None:
            made = asyncio.get_running_loop().create_future()
            self._tasks.start(f"make:{key}"[:80], _fill(made, make))
            made.add_done_callback(lambda done: self._forget_failure(key, done))
        self._made[key] = made  # to the end: the one used last
        if len(self._made) > self._limit:
            del self._made[next(iter(self._made))]
        return await asyncio.shield(made)

    def _forget_failure(self, key: K, made: asyncio.Future[T]) -> None:
        if (made.cancelled() or made.exception()) and self._made.get(key) is made:
            del self._made[key]


async def _fill(made: asyncio.Future[T], make: Callable[[], Any]) -> None:
    """Put what `make` gives, or raises, into `made`. Fails never: whoever waits for `made` is told."""
    try:
        made.set_result(await make())
    except asyncio.CancelledError:
        made.cancel()
        raise
    except Exception as error:  # belongs to those who wait
        made.set_exception(error)
