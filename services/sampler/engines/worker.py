"""The thread that computes. It sleeps when there is nothing to do, and never ends without saying so."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread, current_thread

import torch

from services.sampler.engines.base import EngineLoad
from services.sampler.engines.generation import Generation

log = logging.getLogger(__name__)


class Worker:
    """Runs `generation` and, between its steps, whatever is posted from other threads, in order."""

    def __init__(
        self, generation: Generation, *, name: str, threads: int | None, on_death: Callable[[BaseException], None]
    ) -> None:
        """`threads`: torch's for one operation (None: torch's choice). `on_death` is called in the worker's thread."""
        self._generation = generation
        self._threads = threads
        self._on_death = on_death
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = Condition()
        self._stopping = False
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self.load = EngineLoad()
        """As of the end of the last step."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` in the worker's thread before its next step. It must not raise."""
        with self._wake:
            self._posted.append(action)
            self._wake.notify()

    def stop(self) -> None:
        """End after the current step and wait until it has. What is posted or runs is dropped. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and self._thread is not current_thread():
            self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # OpenMP keeps it by thread, so it is set in this one
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        except BaseException as error:
            log.critical("the sampler's worker thread has died", exc_info=error)
            self._on_death(error)

    def _turn(self) -> bool:
        """Do what was posted and one step: begin what can begin, decode. Return False when it is time to end."""
        with self._wake:
            while not (self._posted or self._stopping or self._generation.busy):
                self._wake.wait()
            if self._stopping:
                return False
            actions, self._posted = self._posted, deque()
        for action in actions:
            action()
        for part in (self._generation.begin, self._generation.decode):
            part()
            self.load = self._generation.load()
            self._generation.deliver()
        return True
