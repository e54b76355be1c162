"""Wiring of a trainer.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| runs | bucket `runs` | a new run of our base model | the gateway or the coordinator |
| claims | runs that nobody holds | a lease | expiry of a killed trainer's lease |
| log, one a run | `rl.v1.train.<run>` behind the snapshot | room in the backlog | an executed operation |
| execution | the backlogs of all runs | the next seq of any run; the engine | a log reader |
| files, one a run | a save, a load, a snapshot that is due | the blob store, others' files | execution |
| places | runs that have been idle, runs beyond the limits | a second; the end of what is being executed | the clock |
| leases | - | a quarter of their time to live | the clock |

One thread computes (`EngineThread`); everything else is in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from services.trainer.answers import Answers
from services.trainer.config import TrainerConfig
from services.trainer.engine_thread import EngineThread
from services.trainer.engines.base import TrainerEngine
from services.trainer.fair import Piece
from services.trainer.handlers import Operations, goes_aside, needs_device
from services.trainer.held import HeldRun
from services.trainer.loads import Loads
from services.trainer.logs import Logs
from services.trainer.metrics import TrainerMetrics
from services.trainer.places import Places
from services.trainer.policy import Head, Scheduler, Turn
from services.trainer.runs import Runs
from services.trainer.saves import Saves
from services.trainer.snapshots import Snapshots
from shared import observe
from shared.contracts.training import AnyOperation, OptimStep
from shared.errors import TemporaryError
from shared.model_offers import model_offers
from shared.node import Node
from shared.usage import Usage

log = logging.getLogger(__name__)

RETRY_LOOK = 0.2
TIDY_SECONDS = 1.0
FILES_AT_A_TIME = 4
"""Runs whose files are written or read at the same time: each holds a state or an adapter in memory."""


class TrainerService:
    """One trainer."""

    def __init__(
        self, config: TrainerConfig, node: Node, make_engine: Callable[[TrainerConfig], TrainerEngine]
    ) -> None:
        self.base_model: str | None = config.base_model
        self.offers: Sequence[str] = model_offers(Path(config.model_dir))
        self._config = config
        self._node = node
        self._engine = EngineThread(lambda: make_engine(config))
        held: dict[str, HeldRun] = {}
        self._held = held
        self._scheduler = Scheduler(config.max_pass_tokens, config.tenant_weights)
        self._metrics = TrainerMetrics(node.telemetry.registry, held.values)
        self._stopping = asyncio.Event()
        self._executing = asyncio.Lock()
        self._files = asyncio.Semaphore(FILES_AT_A_TIME)
        self._usage = Usage(node.bus, config.base_model)
        answers = Answers(node)
        snapshots = Snapshots(node, config, self._engine, self._metrics, held, answers.settled)
        self._snapshots = snapshots
        self._places = Places(config, self._engine, self._metrics, held, snapshots)
        saves = Saves(node, self._engine, held)
        loads = Loads(node, self._engine, self._places, snapshots, self._executing)
        self._operations = Operations(
            node, self._engine, self._metrics, self._places, answers, saves, loads, self._usage
        )
        self._logs = Logs(node.bus, config, self._operations.repeated, self._operations.refuse)
        self._runs = Runs(
            node, config, self._engine, self._metrics, held, snapshots, self._logs, self._scheduler.forget
        )
        self._doing = ""

    def activity(self) -> str:
        """See `Service.activity`."""
        waiting = sum(len(held.backlog.waiting) for held in self._held.values())
        runs = f"{len(self._held)} runs"
        return f"{self._doing}, {runs}, {waiting} waiting" if self._doing else f"idle, {runs}"

    async def start(self) -> None:
        """Load the model, then look for runs."""
        await self._engine.start()
        self._runs.start()
        self._node.tasks.start("execution", self._execute())
        self._node.tasks.start("places", self._tidy_for_ever())
        self._usage.start(self._node.tasks)

    async def stop(self) -> None:
        """Finish the operations that run, write down all runs, release them."""
        self._stopping.set()
        async with self._executing:
            """The turn that was taken is over, and no other begins."""
        if aside := [held.aside for held in self._held.values() if held.aside is not None]:
            await asyncio.wait(aside, timeout=self._node.drain_seconds)
        async with self._executing:
            await self._runs.stop()
        await self._usage.stop()
        self._engine.close()

    async def _execute(self) -> None:
        while not self._stopping.is_set():
            self._logs.work.clear()  # before looking: what comes from now on wakes us
            async with self._executing:
                turn = None if self._stopping.is_set() else self._scheduler.next_turn(self._heads())
                if turn is not None:
                    started = time.monotonic()
                    await self._take(turn)
                    self._metrics.busy_seconds.inc(time.monotonic() - started)
                    continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_LOOK if self._anything_waits() else None):
                    await self._logs.work.wait()

    def _heads(self) -> dict[str, Head]:
        """The operations whose turn it is, of runs that wait neither for files nor after a temporary error."""
        now = time.monotonic()
        return {
            name: Head(held.head.message, held.record.owner, held.data_done)
            for name, held in self._held.items()
            if held.backlog.head is not None and held.not_before <= now and held.aside is None
        }

    def _anything_waits(self) -> bool:
        return any(held.backlog.head is not None and held.aside is None for held in self._held.values())

    async def _take(self, turn: Turn) -> None:
        pieces = {piece.run: piece for piece in turn.pieces}
        runs = [self._held[name] for name in pieces or turn.steps or (turn.single,)]
        waiting = runs
        while waiting := [held for held in waiting if self._can_go_on(held)]:
            # What is left out waits until these have been served.
            ready = await self._places.bring(waiting) if needs_device(waiting[0].head.message) else waiting
            waiting = [held for held in waiting if held not in ready]
            for held in await self._run([held for held in ready if self._is_ours(held)], pieces):
                self._finish(held)
        for held in runs:
            if held.broken is not None and held.backlog.head is not None and self._is_ours(held):
                self._operations.refuse(held.head, held.broken)
                held.finish_head()

    def _finish(self, held: HeldRun) -> None:
        if self._is_ours(held):
            held.finish_head()
            if self._snapshots.is_due(held):
                self._start_aside(held, self._snapshots.write)

    def _start_aside(self, held: HeldRun, work: Callable[[HeldRun], Awaitable[object]]) -> None:
        """Do something with a run's files, while the operations of others go on. Until then its own wait."""
        held.aside = self._node.tasks.start(f"files of {held.name}", self._aside(held, work))

    async def _aside(self, held: HeldRun, work: Callable[[HeldRun], Awaitable[object]]) -> None:
        try:
            async with self._files:
                await work(held)
        finally:
            held.aside = None
            self._logs.work.set()

    async def _do_aside(self, held: HeldRun) -> None:
        if not await self._tried(held, self._operations.aside) or not self._is_ours(held):
            return
        held.finish_head()
        if self._snapshots.is_due(held):
            await self._snapshots.write(held)

    def _can_go_on(self, held: HeldRun) -> bool:
        return self._is_ours(held) and held.broken is None and held.not_before <= time.monotonic()

    async def _run(self, runs: list[HeldRun], pieces: dict[str, Piece]) -> list[HeldRun]:
        """Execute the heads of runs, or pieces of them, and return whose are done."""
        if not runs:
            return []
        self._doing = f"{_verb(runs[0].head.message)} {len(runs)} runs"
        try:
            if pieces:
                return await self._operations.run_pass(runs, [pieces[held.name] for held in runs])
            if isinstance(runs[0].head.message, OptimStep):
                await self._operations.step(runs)
                return runs
            if goes_aside(runs[0].head.message):
                self._start_aside(runs[0], self._do_aside)
                return []
            return [held for held in runs if await self._tried(held, self._operations.single)]
        finally:
            self._doing = ""

    async def _tried(self, held: HeldRun, execute: Callable[[HeldRun], Awaitable[None]]) -> bool:
        """Execute the head of a run. False: it is to be tried again later."""
        with observe.bound(run=held.name, request=held.head.message.request_id):
            try:
                await execute(held)
            except TemporaryError as error:
                held.not_before = time.monotonic() + error.delay
                log.warning("run %s waits: %s", held.name, error)
                return False
        return True

    def _is_ours(self, held: HeldRun) -> bool:
        """Whether the lease is still there. If it went while the engine computed, what was done counts for nobody."""
        return self._held.get(held.name) is held

    async def _tidy_for_ever(self) -> None:
        while not self._stopping.is_set():
            await asyncio.sleep(TIDY_SECONDS)
            more = True
            while more and not self._stopping.is_set():
                async with self._executing:
                    more = await self._places.tidy()


def _verb(operation: AnyOperation) -> str:
    verbs = {"ForwardBackward": "training", "OptimStep": "stepping", "CreateRun": "creating", "LoadState": "loading"}
    return verbs.get(type(operation).__name__, "saving")
