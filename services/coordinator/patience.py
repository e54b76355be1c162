"""Waiting for a bus that is away and a disk that is full: a job outlives both."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shared.errors import TemporaryError

T = TypeVar("T")
log = logging.getLogger(__name__)


class Patience:
    """Calls again after temporary errors; however many calls wait, it is said once, and once that they go on."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._waiting = 0

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` gives, as soon as it raises no `TemporaryError`."""
        waits = False
        try:
            while True:
                try:
                    return await call()
                except TemporaryError as error:
                    if not waits:
                        waits = True
                        self._count(1, error)
                    await asyncio.sleep(error.delay)
        finally:
            if waits:
                self._count(-1, None)

    def _count(self, change: int, error: TemporaryError | None) -> None:
        before, self._waiting = self._waiting, self._waiting + change
        if not before:
            log.warning("job %s waits: %s", self._job, error)
        elif not self._waiting:
            log.info("job %s waits no longer", self._job)
