"""Who may begin: requests wait, owners in turn, until there are places for all of their sequences."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.sampler.engines.batching import Room, Running, Waiting, admit
from services.sampler.engines.fair import FairQueue

_ANY = 1 << 60


@dataclass(eq=False, frozen=True)
class _Turn:
    owner: str
    cost: float
    waiting: Waiting
    begins: asyncio.Future[None]


class Places:
    """Places for sequences. How much cache they take is vLLM's to see to; it lets some wait if there is too little."""

    def __init__(self, count: int) -> None:
        self._room = Room(rows=count, positions=_ANY, prompt_tokens=_ANY)
        self._queue: FairQueue[_Turn] = FairQueue(lambda turn: turn.owner, lambda turn: turn.cost)
        self._running: set[_Turn] = set()

    @property
    def running(self) -> int:
        """Places that are taken."""
        return sum(turn.waiting.rows for turn in self._running)

    @property
    def waiting(self) -> int:
        """Places that are waited for."""
        return sum(turn.waiting.rows for turn in self._queue)

    @contextlib.asynccontextmanager
    async def taken(self, rows: int, *, owner: str, cost: float, isolated: bool) -> AsyncIterator[None]:
        """Have places inside the block, all of them if `isolated`. `cost` is what is counted against the owner."""
        begins: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turn = _Turn(owner, cost, Waiting(rows, prompt=0, length=0, isolated=isolated), begins)
        self._queue.add(turn)
        self._begin()
        try:
            await begins
            yield
        finally:
            self._queue.remove(turn)
            self._running.discard(turn)
            self._begin()

    def _begin(self) -> None:
        waiting = list(self._queue.in_turn())
        running = Running(self.running, isolated=any(turn.waiting.isolated for turn in self._running))
        begun = waiting[: admit([turn.waiting for turn in waiting], running, self._room)]
        self._queue.take(begun)
        for turn in begun:
            self._running.add(turn)
            if not turn.begins.done():
                turn.begins.set_result(None)
