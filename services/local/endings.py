"""Ends tasks for certain, and finishes what must be finished although its task is cancelled.

On Python 3.11, `asyncio.wait_for`, which the bus waits with, loses a cancellation that comes at the moment at which
what it waits for is done: the task goes on. Asked once, such a task would be waited for in vain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

AGAIN_SECONDS = 0.25


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until all have ended, whatever they raise."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=AGAIN_SECONDS)
        for task in done:
            if not task.cancelled():
                task.exception()  # retrieved: somebody else has been told, or nobody wants to know


async def finish(work: Coroutine[Any, Any, None]) -> None:
    """Do all of the work, also if this task is cancelled meanwhile; then it is cancelled afterwards."""
    working = asyncio.ensure_future(work)
    cancelled = False
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError:
            cancelled = True
    working.result()
    if cancelled:
        raise asyncio.CancelledError
