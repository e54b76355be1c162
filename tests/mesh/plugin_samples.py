"""Environments and rewards of tests, registered as plugins of the services."""

from __future__ import annotations

import os
import threading
import time

from services.environment.api import Environment, EnvironmentParams, Message, Play, Split, Step, Task
from services.reward.api import PlayedEpisode
from shared.errors import TemporaryError

released = threading.Event()
"""Lets calls that hang come back; set at the end of a test."""
steps_wait = threading.Event()
"""Lets steps that wait go on."""
waiting: list[str] = []
"""Replies whose steps have begun to wait."""
closed: list[object] = []
"""States of the episodes that were closed."""
tries: list[int] = []
"""Calls of `flaky`."""


def capitals(split: Split, index: int, seed: int, *, country: str = "France") -> Task:
    """A single-turn environment that is a function."""
    return Task(question=f"{split} {index} {seed}: the capital of {country}?", answer="Paris")


def flaky(split: Split, index: int, seed: int, *, failures: int) -> Task:
    """Fails for a while in a way that is worth trying again."""
    tries.append(index)
    if len(tries) <= failures:
        raise TemporaryError("the data base is away", delay=0.01)
    return Task(question="Now?", answer="yes")


class Moody(Environment[EnvironmentParams]):
    """Does what the replies say, with one step after the other: hang, raise, lie, nan, go on; anything else ends it."""

    max_turns = 3

    def task(self, split: Split, index: int, seed: int) -> Task:
        """The same each time."""
        return Task(question="Well?")

    def step(self, play: Play, reply: str) -> Step:
        """See the class."""
        play.state = [*(play.state or []), reply]
        if reply == "hang":
            released.wait()
        if reply == "wait and go on":
            waiting.append(reply)
            steps_wait.wait()
            return Step(done=False, messages=[Message(role="user", content="And?")])
        if reply == "raise":
            raise LookupError("no such mood")
        if reply == "lie":
            return None  # type: ignore[return-value]
        if reply == "go on":
            return Step(done=False, messages=[Message(role="user", content="And?")], reward=0.25)
        return Step(done=True, reward=float("nan") if reply == "nan" else 0.5)

    def close(self, play: Play) -> None:
        """Remember it."""
        closed.append(play.state)


class SlowTask(Moody):
    """Hangs before there is anything to play."""

    def task(self, split: Split, index: int, seed: int) -> Task:
        """Never comes back by itself."""
        released.wait()
        return Task(question="?")


def obedient(episode: PlayedEpisode, *, otherwise: float = 0.5) -> object:
    """A reward that does what the reply says."""
    if episode.reply == "hang":
        time.sleep(3600)
    if episode.reply == "raise":
        raise LookupError("no such mood")
    if episode.reply == "crash":
        os._exit(3)
    if episode.reply == "memory":
        return len(bytearray(1 << 45))
    if episode.reply == "print":
        print("\x00\x00\x00\x00 to standard output")  # noqa: T201 - what it may not do any harm with
    return {"nan": float("nan"), "inf": float("inf"), "text": "good"}.get(episode.reply, otherwise)
