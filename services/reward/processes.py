"""The processes that score, as the service sees them: lent out, watched, ended and replaced.

Processes rather than threads, because a thread cannot be ended: one bad regular expression or one huge power holds the
interpreter lock for ever, and with it the whole service. Ending a process costs the episode that hung and nothing
else. They also bound memory, and keep imports of plugins away from the service. They are no sandbox: what they run
may read files and use the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence

from prometheus_client import Counter

from services.reward.protocol import LENGTH, Answer, Hello, Question, Refused, frame
from shared import wire
from shared.errors import PermanentError, TemporaryError, UserError

START_SECONDS = 60.0
"""To start and to import all plugins."""
BOOT = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from services.reward.child import main
main(sys.argv[2])
"""
# They get the service's own search path, so that they can import what it can.


class Ended(PermanentError):
    """A process ended without an answer."""


class Process:
    """One scoring process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Use `start`."""
        assert process.stdin
        assert process.stdout
        self._process = process
        self._questions = process.stdin
        self._answers = process.stdout
        self.usable = True
        """It is at rest and can be asked."""

    @classmethod
    async def start(cls, plugins: Sequence[str], memory_mib: int) -> tuple[Process, Hello]:
        """Start one, and hear what it can score. Raise `UserError` if the plugins cannot work."""
        settings = json.dumps({"plugins": list(plugins), "memory_mib": memory_mib})
        arguments = (sys.executable, "-c", BOOT, json.dumps(sys.path), settings)
        pipe = asyncio.subprocess.PIPE
        # A session of its own, to end it together with what it started itself. Also, Ctrl-C is for the service alone,
        # which lets running work finish.
        started = await asyncio.create_subprocess_exec(*arguments, stdin=pipe, stdout=pipe, start_new_session=True)
        process = cls(started)
        try:
            return process, await process._greeting(plugins)
        except BaseException:
            await process.end()
            raise

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.returncode is None

    async def ask(self, question: Question) -> Answer:
        """The answer to a question. Raise `Ended` if the process ends over it. After a cancellation it is unusable."""
        self.usable = False
        try:
            self._questions.write(frame(question))
            await self._questions.drain()
            answer = await self._read()
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self._process.wait()
            raise Ended(f"the process that scored it ended with code {code}") from None
        self.usable = True
        return answer

    async def end(self) -> None:
        """Kill it and what it started, if it still runs."""
        self.usable = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._questions.close()
        await self._process.wait()

    async def _greeting(self, plugins: Sequence[str]) -> Hello:
        try:
            async with asyncio.timeout(START_SECONDS):
                hello = await self._read()
        except TimeoutError:
            which = f" with plugins {', '.join(plugins)}: look for one that hangs on import" if plugins else ""
            raise UserError(f"a scoring process did not start in {START_SECONDS:.0f} s{which}") from None
        except asyncio.IncompleteReadError:
            raise TemporaryError("a scoring process ended as it started: see the log for its last words") from None
        if isinstance(hello, Refused):
            raise UserError(hello.failure.message)
        assert isinstance(hello, Hello)
        return hello

    async def _read(self) -> Answer:
        length = LENGTH.unpack(await self._answers.readexactly(LENGTH.size))[0]
        answer: Answer = wire.decode(await self._answers.readexactly(length), Answer, json=False)
        return answer


class Processes:
    """Up to `count` scoring processes, started when they are needed."""

    def __init__(self, count: int, plugins: Sequence[str], memory_mib: int, replaced: Counter) -> None:
        self._plugins = plugins
        self._memory_mib = memory_mib
        self._replaced = replaced
        self._free = asyncio.Semaphore(count)
        self._idle: list[Process] = []

    async def start(self) -> Hello:
        """Start the first one. Raise `UserError` if the plugins cannot work."""
        process, hello = await Process.start(self._plugins, self._memory_mib)
        self._idle.append(process)
        return hello

    async def close(self) -> None:
        """End all that are at rest. Those at work end when their lease does."""
        while self._idle:
            await self._idle.pop().end()

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Process]:
        """One for the caller alone; waits until one is free. One that was left in the middle of work is ended."""
        async with self._free:
            process = await self._next()
            try:
                yield process
            finally:
                if process.usable:
                    self._idle.append(process)
                else:
                    self._replaced.inc()
                    await process.end()

    async def _next(self) -> Process:
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
            await process.end()  # it died at rest, which is nobody's fault that it could be told
        return (await Process.start(self._plugins, self._memory_mib))[0]
