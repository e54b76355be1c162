"""How much work a group has, in replicas that would be busy all the time. Pure.

For samplers and trainers alike

    work = busy + (growth + queue / clear) / speed

busy      replicas' worth of what is in progress: running sequences / slots, or duty cycle * replicas
queue     what waits: sequences, or tokens of trainers' backlogs
growth    how much longer the queue gets each second; a queue that gets shorter is no reason to have fewer
clear     seconds in which a queue that has piled up should be gone (`clear_seconds`)
speed     what a busy replica finishes in a second, measured as finished / busy

which is Little's law with a term for what has piled up: while replicas start, a queue grows to many times what it
takes to keep up, and replicas for all of it at once would be ready when it is gone. Samplers never need more than
replicas for all sequences at once, (running + queue) / slots, which also serves while the speed is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.autoscaler.config import GroupConfig
from services.autoscaler.observed import Load, Measured

FULL_CACHE = 0.9
"""Share of the key-value cache from which it, rather than the number of slots, decides how many sequences run."""


@dataclass(frozen=True)
class Sample:
    """A group's load at one time."""

    at: float
    """When the newest part of it was measured."""
    busy: float
    queue: float
    finished: float | None
    """Sequences or tokens a second; None: not known."""
    slots: float
    """Samplers: sequences that a replica really has room for. Trainers: 0."""
    calls: float = 0.0
    """Requests or operations that nobody has taken: what a group at zero wakes up for."""
    oldest: float = 0.0
    """Seconds that the oldest of them has waited."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do at all."""
        return not (self.busy or self.queue or self.calls)


@dataclass(frozen=True)
class Missing:
    """Why there is no sample."""

    why: str


def sample(load: Load | None, config: GroupConfig, ready: int, fresh_seconds: float, now: float) -> Sample | Missing:
    """Make a sample of the metrics. A group without ready replicas has none to measure: there the queue suffices."""
    if load is None:
        return Missing("no metrics")
    needed = {"queued": load.queued}
    if ready:
        needed |= (
            {"running": load.running, "waiting": load.waiting}
            if config.role == "sampler"
            else {"backlog": load.backlog, "duty": load.duty}
        )
    for name, measured in needed.items():
        if measured is None:
            return Missing(f"the metric '{name}' is missing")
        if measured.age > fresh_seconds:
            return Missing(f"the metric '{name}' is {measured.age:.0f} s old")
    at = now - min(measured.age for measured in needed.values() if measured)
    if config.role == "sampler":
        return _of_samplers(load, config, ready, fresh_seconds, at)
    return _of_trainers(load, ready, fresh_seconds, at)


def _of_samplers(load: Load, config: GroupConfig, ready: int, fresh: float, at: float) -> Sample:
    queued = _value(load.queued, fresh) or 0.0
    running = (_value(load.running, fresh) or 0.0) if ready else 0.0
    waiting = (_value(load.waiting, fresh) or 0.0) if ready else 0.0
    slots = float(config.slots)
    cache = _value(load.kv_cache, fresh) or 0.0
    if ready and waiting and running and cache >= FULL_CACHE:
        slots = min(slots, running / ready / cache)
    oldest = _value(load.oldest, fresh) or 0.0
    finished = _value(load.finished, fresh)
    return Sample(at, running / slots, queued + waiting, finished, slots, calls=queued, oldest=oldest)


def _of_trainers(load: Load, ready: int, fresh: float, at: float) -> Sample:
    backlog = (_value(load.backlog, fresh) or 0.0) if ready else 0.0
    duty = (_value(load.duty, fresh) or 0.0) if ready else 0.0
    queued, oldest = _value(load.queued, fresh) or 0.0, _value(load.oldest, fresh) or 0.0
    return Sample(at, duty * ready, backlog, _value(load.tokens, fresh), 0.0, calls=queued, oldest=oldest)


def _value(measured: Measured | None, fresh: float) -> float | None:
    return measured.value if measured is not None and measured.age <= fresh else None


@dataclass(frozen=True)
class Work:
    """What a window of samples comes to."""

    replicas: float
    """Replicas that would be busy all the time."""
    busy: float
    queue: float
    seconds: float
    """Length of the window."""


def work(samples: Sequence[Sample], seconds: float, config: GroupConfig) -> Work:
    """Average the samples of the last `seconds`, counted from the newest one, so that a lag changes nothing."""
    newest = samples[-1]
    window = [one for one in samples if one.at > newest.at - seconds]
    busy = sum(one.busy for one in window) / len(window)
    queue = sum(one.queue for one in window) / len(window)
    span = newest.at - window[0].at
    growth = max(0.0, (newest.queue - window[0].queue) / span) if span > 0 else 0.0
    at_once = busy + queue / newest.slots if newest.slots else None
    speed = _speed(window, busy, config)
    if speed is None:
        assert at_once is not None, "only samplers may have no speed"
        return Work(at_once, busy, queue, seconds)
    needed = busy + (growth + queue / config.clear_seconds) / speed
    return Work(needed if at_once is None else min(needed, at_once), busy, queue, seconds)


def _speed(window: Sequence[Sample], busy: float, config: GroupConfig) -> float | None:
    """What a busy replica finishes in a second. None: nobody knows yet."""
    measured = [one.finished for one in window if one.finished is not None]
    finished = sum(measured) / len(measured) if measured else 0.0
    if finished > 0 and busy > 0:
        return finished / busy
    return config.tokens_per_second if config.role == "trainer" else None
