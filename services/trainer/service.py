"""Wiring of a trainer.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| runs | bucket `runs` | a new run of our base model | the gateway or the coordinator |
| claims | runs that nobody holds | a lease | expiry of a killed trainer's lease |
| log, one a run | `rl.v1.train.<run>` behind the snapshot | room in the backlog | an executed operation |
| execution | the backlogs of all runs | the next seq of any run; the engine | a log reader |
| leases | - | a quarter of their time to live | the clock |

One thread computes (`EngineThread`); everything else is in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from services.trainer.config import TrainerConfig
from services.trainer.engine_thread import EngineThread
from services.trainer.engines.base import TrainerEngine
from services.trainer.handlers import Operations
from services.trainer.metrics import TrainerMetrics
from services.trainer.policy import Turn, next_turn
from services.trainer.runs import Runs
from shared import observe
from shared.bus import Delivery
from shared.contracts.training import AnyOperation
from shared.errors import TemporaryError
from shared.node import Node

log = logging.getLogger(__name__)

RETRY_LOOK = 0.2


class TrainerService:
    """One trainer."""

    offers: Sequence[str] = ()

    def __init__(
        self, config: TrainerConfig, node: Node, make_engine: Callable[[TrainerConfig], TrainerEngine]
    ) -> None:
        self.base_model: str | None = config.base_model
        self._config = config
        self._node = node
        self._engine = EngineThread(lambda: make_engine(config))
        self._metrics = TrainerMetrics(node.telemetry.registry, lambda: len(self._runs.held), self._backlog)
        self._operations = Operations(node, self._engine, self._metrics)
        self._runs = Runs(
            node, config, self._engine, self._metrics, self._operations.repeated, self._operations.settled
        )
        self._last_served: dict[str, float] = {}
        self._stopping = asyncio.Event()
        self._executing = asyncio.Lock()
        self._doing = ""

    def activity(self) -> str:
        """See `Service.activity`."""
        waiting = self._backlog()
        runs = f"{len(self._runs.held)} runs"
        return f"{self._doing}, {runs}, {waiting} waiting" if self._doing else f"idle, {runs}"

    async def start(self) -> None:
        """Load the model, then look for runs."""
        await self._engine.start()
        self._runs.start()
        self._node.tasks.start("execution", self._execute())

    async def stop(self) -> None:
        """Finish the operation that runs, write down all runs, release them."""
        self._stopping.set()
        async with self._executing:
            await self._runs.stop()
        self._engine.close()

    def _backlog(self) -> int:
        return sum(len(held.backlog.waiting) for held in self._runs.held.values())

    async def _execute(self) -> None:
        while not self._stopping.is_set():
            self._runs.work.clear()  # before looking: what comes from now on wakes us
            async with self._executing:
                turn = next_turn(self._heads(), self._last_served, self._config.max_pass_tokens)
                if turn is not None:
                    started = time.monotonic()
                    await self._take(turn)
                    self._metrics.busy_seconds.inc(time.monotonic() - started)
                    continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_LOOK if self._anything_waits() else None):
                    await self._runs.work.wait()

    def _heads(self) -> dict[str, AnyOperation]:
        """The operations whose turn it is, of runs that are not waiting after a temporary error."""
        now = time.monotonic()
        return {
            name: held.backlog.head.message
            for name, held in self._runs.held.items()
            if held.backlog.head is not None and held.not_before <= now
        }

    def _anything_waits(self) -> bool:
        return any(held.backlog.head is not None for held in self._runs.held.values())

    async def _take(self, turn: Turn) -> None:
        names = (turn.single,) if turn.single else turn.steps or turn.shared_pass
        able = [name for name in names if self._answered_if_broken(name)]
        try:
            if able:
                await self._run(turn, able)
        finally:
            self._doing = ""
        for name in names:
            self._last_served[name] = time.monotonic()
            if name in self._runs.held and self._runs.snapshot_is_due(name):
                await self._runs.write_snapshot(name)

    async def _run(self, turn: Turn, names: list[str]) -> None:
        deliveries = [self._head(name) for name in names]
        if turn.single:
            with observe.bound(run=turn.single, request=deliveries[0].message.request_id):
                if not await self._run_single(turn.single, deliveries[0]):
                    return
        elif turn.steps:
            self._doing = f"stepping {len(names)} runs"
            await self._operations.step(deliveries)
        else:
            self._doing = f"training {len(names)} runs"
            await self._operations.run_pass(deliveries)
        for name in names:
            self._done(name)

    async def _run_single(self, name: str, delivery: Delivery[AnyOperation]) -> bool:
        """False: it is to be tried again later."""
        self._doing = type(delivery.message).__name__
        held = self._runs.held[name]
        try:
            await self._operations.single(delivery, held)
        except TemporaryError as error:
            held.not_before = time.monotonic() + error.delay
            log.warning("run %s waits: %s", name, error)
            return False
        return True

    def _head(self, name: str) -> Delivery[AnyOperation]:
        head = self._runs.held[name].backlog.head
        assert head is not None
        return head

    def _done(self, name: str) -> None:
        # The lease may have gone while the engine was computing; then the result counts for nobody.
        if (held := self._runs.held.get(name)) is not None:
            held.backlog.done()
            held.room.set()
            held.done_since_snapshot += 1

    def _answered_if_broken(self, name: str) -> bool:
        """False: the run could not be brought back, and its head has been answered with the reason."""
        held = self._runs.held[name]
        if held.broken is None:
            return True
        self._operations.refuse(self._head(name), held.broken)
        held.backlog.done()
        held.room.set()
        return False
