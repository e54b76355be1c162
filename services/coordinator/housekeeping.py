"""What of clients' sessions is not needed any more. Pure: the time is passed in.

Jobs look after their own: a run without a session, and all that is its, is left alone. What is in doubt stays until
the next look.

A policy is needed while something names it: a checkpoint, a sampler of a session that goes on, sampling in flight. It
is recorded before a checkpoint may name it, so of a run that goes on only policies go whose operation is behind the
run's snapshot: answered, recorded, and never done again. They also stay for a while after the last that named them has
gone, since requests that are on their way name them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shared import topology
from shared.contracts.checkpoints import CheckpointRecord
from shared.contracts.policies import PolicyRef
from shared.contracts.sessions import SamplerRecord, SessionRecord
from shared.contracts.training import RunRecord
from shared.tables import Entry


@dataclass(frozen=True)
class Rules:
    """How long things stay, in seconds."""

    silence: float
    """A session whose heartbeats have expired, seen so from the first look to the last, before it lapses."""
    grace: float
    """Runs and samplers of a session that has ended."""
    unnamed: float
    """Policies that nothing names any more."""


@dataclass(frozen=True)
class Seen:
    """What the buckets hold. Policies were read before what may name them."""

    sessions: Mapping[str, SessionRecord]
    alive: frozenset[str]
    """Sessions with a heartbeat."""
    runs: Mapping[str, RunRecord]
    policies: Sequence[PolicyRef] = ()
    checkpoints: Sequence[Entry[CheckpointRecord]] = ()
    samplers: Sequence[SamplerRecord] = ()
    inflight: Mapping[str, PolicyRef] = field(default_factory=dict)


@dataclass(frozen=True)
class Removals:
    """What is to be done, in this order."""

    expired: tuple[Entry[CheckpointRecord], ...] = ()
    lapsed: tuple[str, ...] = ()
    """Sessions to end."""
    runs: tuple[str, ...] = ()
    """Runs to close."""
    samplers: tuple[str, ...] = ()
    inflight: tuple[str, ...] = ()
    """Runs that are not sampled in flight any more."""
    policies: tuple[PolicyRef, ...] = ()


Since = Mapping[str, float]
"""When something was first seen as it still is: silent sessions and unnamed policies, by their names."""


def removals(seen: Seen, since: Since, rules: Rules, now: float) -> tuple[Removals, Since]:
    """What to remove now, and what to pass as `since` at the next look."""
    silent = [name for name, session in seen.sessions.items() if _is_silent(session, seen.alive, now)]
    over = {name for name, session in seen.sessions.items() if _is_over(session, rules, now)}
    named = _named(seen, over)
    unnamed = [policy for policy in seen.policies if _session(policy.run, seen) and policy not in named]
    next_since = {str(each): since.get(str(each), now) for each in (*silent, *unnamed)}
    return (
        Removals(
            expired=tuple(entry for entry in seen.checkpoints if _is_expired(entry.value, now)),
            lapsed=tuple(name for name in silent if now - next_since[name] >= rules.silence),
            runs=tuple(name for name, run in seen.runs.items() if run.session in over and _is_open(run)),
            samplers=tuple(sampler.sampler for sampler in seen.samplers if sampler.session in over),
            inflight=tuple(name for name in seen.inflight if _session(name, seen) in over),
            policies=tuple(policy for policy in unnamed if _may_go(policy, next_since, seen, over, rules, now)),
        ),
        next_since,
    )


def _is_silent(session: SessionRecord, alive: frozenset[str], now: float) -> bool:
    """A session may have ended before its first heartbeat; so it has as long as one lasts."""
    expired = now - session.created > topology.HEARTBEATS.ttl
    return session.ended is None and session.session not in alive and expired


def _is_over(session: SessionRecord, rules: Rules, now: float) -> bool:
    return session.ended is not None and now - (session.ended_at or session.created) >= rules.grace


def _is_expired(record: CheckpointRecord, now: float) -> bool:
    return record.expires is not None and record.expires <= now


def _is_open(run: RunRecord) -> bool:
    """Whether it has still to be closed; also one that was closed by somebody who died in the middle of it."""
    return not run.closed or run.snapshot is not None


def _session(run: str, seen: Seen) -> str:
    """Empty: it is a job's, or not known."""
    return seen.runs[run].session if run in seen.runs else ""


def _named(seen: Seen, over: set[str]) -> set[PolicyRef | None]:
    return {
        *(entry.value.policy for entry in seen.checkpoints),
        *(sampler.policy for sampler in seen.samplers if sampler.session not in over),
        *(policy for run, policy in seen.inflight.items() if _session(run, seen) not in over),
    }


def _may_go(policy: PolicyRef, since: Since, seen: Seen, over: set[str], rules: Rules, now: float) -> bool:
    run = seen.runs[policy.run]
    if run.closed:
        return run.session in over or now - since[str(policy)] >= rules.unnamed
    done = run.snapshot is not None and run.snapshot.seq >= policy.version
    return done and now - since[str(policy)] >= rules.unnamed
