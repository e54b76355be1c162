"""A process that scores episodes, one after the other, for the reward service (see `processes`).

It reads questions from what was its standard input and writes answers to what was its standard output. Rewards run in
the main thread, where signals work.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import BinaryIO

from services.reward.policy import Scorer
from services.reward.protocol import (
    LENGTH,
    Answer,
    Check,
    Checked,
    Hello,
    Prepare,
    Question,
    Ready,
    Refused,
    Scored,
    frame,
)
from services.reward.registry import Registry
from shared import wire
from shared.errors import MeshError, UserError, failure_of

MIB = 1 << 20
PR_SET_PDEATHSIG = 1
"""Linux: which signal to get when the parent dies."""


def main(settings: str) -> None:
    """Answer until the input ends. `settings` is JSON: `plugins`, and `memory_mib` (0: no limit)."""
    questions, answers = private_pipes()
    given = json.loads(settings)
    end_with_parent()
    if given["memory_mib"]:
        limit_memory(given["memory_mib"] * MIB)
    try:
        registry = Registry.load(given["plugins"])
    except UserError as error:
        say(answers, Refused(failure=failure_of(error)))
        return
    say(answers, Hello(names=registry.names, broken=registry.broken))
    serve(registry, questions, answers)


def private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to and from the service, out of reach of rewards that print, read, or start processes."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return questions, answers


def serve(registry: Registry, questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer questions until there are no more."""

    @lru_cache(maxsize=64)
    def scorer(name: str, params: bytes) -> Scorer:
        return registry.scorer(name, wire.decode(params, dict, json=False))

    def answer(question: Question) -> Answer:
        try:
            if isinstance(question, Check):
                return Checked(errors=registry.errors(question.reward, question.params, question.path))
            found = scorer(question.reward, wire.encode(question.params, json=False))
            if isinstance(question, Prepare):
                return Ready()
            reward, components = found.score(question.episode)
        except MeshError as error:
            return Refused(failure=failure_of(error))
        return Scored(reward=reward, components=components)

    while length := questions.read(LENGTH.size):
        body = questions.read(LENGTH.unpack(length)[0])
        say(answers, answer(wire.decode(body, Question, json=False)))


def say(answers: BinaryIO, answer: Answer) -> None:
    """Write one answer."""
    answers.write(frame(answer))
    answers.flush()


def end_with_parent() -> None:
    """Have the kernel end this process with the service, even one that hangs. Elsewhere than on Linux it lives on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_memory(limit: int) -> None:
    """Bound the address space, so that a reward that takes too much gets a `MemoryError`, and not the machine."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
