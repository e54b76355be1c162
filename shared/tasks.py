"""Tasks that cannot fail in silence.

`asyncio.create_task` keeps an exception to itself until somebody awaits the task. A `TaskGroup` would cancel its
siblings on the first error, which suits a service's main loops but not its requests. So: a `Tasks` owns named tasks;
an unexpected exception in one is logged at once and ends `Tasks.wait`, which brings the service down loudly, to be
restarted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

log = logging.getLogger(__name__)


CANCEL_AGAIN_SECONDS = 0.25


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended.

    Once is not always enough: until Python 3.12 `asyncio.wait_for`, which libraries use, swallows a cancellation that
    comes at the moment when its own wait ends.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_SECONDS)
        for task in done:
            if not task.cancelled():
                task.exception()  # retrieved: its owner has been told, or nobody wants to know any more


class Tasks:
    """The background tasks of one owner."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failed: asyncio.Future[None] | None = None

    def start(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` in a task that this owner keeps and watches."""
        task = asyncio.create_task(work, name=f"{self._owner}:{name}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def wait(self) -> None:
        """Wait until a task fails, and raise what it raised."""
        if self._failed is None:
            self._failed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """Cancel all tasks and wait for them to end."""
        await cancelled(task for task in self._tasks if task is not asyncio.current_task())
        if self._failed is not None and not self._failed.done():
            self._failed.cancel()

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("task %s failed", task.get_name(), exc_info=error)
        if self._failed is None:
            self._failed = asyncio.get_running_loop().create_future()
        if not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # retrieved: it has been logged
