"""The one thread in which an engine computes, so that the event loop stays free to renew leases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from services.trainer.engines.base import TrainerEngine

P = ParamSpec("P")
R = TypeVar("R")


class EngineThread:
    """An engine and its thread."""

    def __init__(self, make: Callable[[], TrainerEngine]) -> None:
        """`make` loads the model; it is called by `start`, in the thread."""
        self._make = make
        self._engine: TrainerEngine | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.busy_since: float | None = None

    @property
    def engine(self) -> TrainerEngine:
        """The engine; its methods are for `call`."""
        assert self._engine is not None, "not started"
        return self._engine

    async def start(self) -> None:
        """Load the model."""
        self._engine = await self.call(self._make)

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function in the engine's thread."""

        def timed() -> R:
            self.busy_since = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self.busy_since = None

        return await asyncio.get_running_loop().run_in_executor(self._pool, timed)

    def close(self) -> None:
        """End the thread after what it does now."""
        self._pool.shutdown(wait=False, cancel_futures=True)
