"""What the janitor removes, and above all what it leaves alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.coordinator.housekeeping import Removals, Rules, Seen, removals
from shared.contracts.blobs import BlobRef
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord
from shared.contracts.policies import LoraSpec, PolicyRef
from shared.contracts.sessions import SamplerRecord, SessionRecord
from shared.contracts.training import RunRecord, SnapshotRecord
from shared.tables import Entry

NOW = 100_000.0
RULES = Rules(silence=60.0, grace=600.0, unnamed=3600.0)
LIVE = SessionRecord(session="live", owner="ann", created=1.0)
OVER = SessionRecord(session="over", owner="ann", created=1.0, ended="success", ended_at=NOW - 600)
FRESHLY_OVER = msgspec.structs.replace(OVER, session="fresh", ended_at=NOW - 599)
BLOB = BlobRef(key="k", sha256="0", size=1)


def run(session: str, *, closed: bool = False, seq: int | None = None) -> RunRecord:
    snapshot = None if seq is None else SnapshotRecord(seq=seq, stream_seq=1, state=BLOB)
    name = f"{session or 'job'}-run"
    return RunRecord(run=name, base_model="m", lora=LoraSpec(), session=session, closed=closed, snapshot=snapshot)


def seen(*runs: RunRecord, **fields: Any) -> Seen:
    given: dict[str, Any] = {
        "sessions": {each.session: each for each in (LIVE, OVER, FRESHLY_OVER)},
        "alive": frozenset({"live"}),
        "runs": {each.run: each for each in runs},
    }
    return Seen(**{**given, **fields})


def twice(what: Seen, between: float) -> Removals:
    """What is removed at the second of two looks."""
    _, since = removals(what, {}, RULES, NOW - between)
    found, _ = removals(what, since, RULES, NOW)
    return found


def checkpoint(expires: float | None = None, policy: PolicyRef | None = None) -> Entry[CheckpointRecord]:
    key = CheckpointKey(run="gone-run", kind="sampler" if policy else "training", name="a")
    record = CheckpointRecord(
        key=key,
        base_model="m",
        lora=LoraSpec(),
        owner="ann",
        seq=1,
        created=1.0,
        size=1,
        policy=policy,
        expires=expires,
    )
    return Entry(("gone-run", key.kind, "a"), record, 1)


def sampler(session: str, policy: PolicyRef | None = None) -> SamplerRecord:
    return SamplerRecord(sampler=f"{session}:0", session=session, owner="ann", base_model="m", policy=policy)


def policy(session: str, version: int = 5) -> PolicyRef:
    return PolicyRef(run=f"{session or 'job'}-run", version=version)


def test_a_checkpoint_goes_when_its_time_has_come() -> None:
    entries = [checkpoint(NOW - 1), checkpoint(NOW), checkpoint(NOW + 1), checkpoint(None)]
    assert twice(seen(checkpoints=entries), 0).expired == tuple(entries[:2])


@pytest.mark.parametrize(
    ("changes", "alive", "between", "lapses"),
    [
        ({}, False, 60.0, True),
        ({}, False, 59.0, False),  # after the mesh was away, its client may just be coming back
        ({}, True, 60.0, False),
        ({"created": NOW - 899}, False, 60.0, False),  # its first heartbeat may be on its way
        ({"ended": "errored", "ended_at": NOW}, False, 60.0, False),
    ],
)
def test_a_session_lapses_that_is_silent_for_long(
    changes: dict[str, Any], alive: bool, between: float, lapses: bool
) -> None:
    session = msgspec.structs.replace(LIVE, **changes)
    found = twice(seen(sessions={"live": session}, alive=frozenset({"live"} if alive else ())), between)
    assert found.lapsed == (("live",) if lapses else ())


def test_a_session_that_is_heard_of_again_begins_anew() -> None:
    silent = seen(alive=frozenset())
    _, since = removals(silent, {}, RULES, NOW - 100)
    _, since = removals(seen(), since, RULES, NOW - 50)
    found, _ = removals(silent, since, RULES, NOW)
    assert found.lapsed == ()


def test_runs_samplers_and_flights_of_a_session_go_some_time_after_it_has_ended() -> None:
    runs = [run("live"), run("over"), run("fresh"), run(""), run("unknown")]
    samplers = [sampler("live"), sampler("over"), sampler("fresh"), sampler("unknown")]
    inflight = {each.run: PolicyRef(run=each.run, version=1) for each in runs}
    found = twice(seen(*runs, samplers=samplers, inflight=inflight), 0)
    assert found.runs == ("over-run",)
    assert found.samplers == ("over:0",)
    assert found.inflight == ("over-run",)


def test_a_run_whose_closing_was_broken_off_is_closed_again() -> None:
    assert twice(seen(run("over", closed=True)), 0).runs == ()
    assert twice(seen(run("over", closed=True, seq=3)), 0).runs == ("over-run",)


def test_what_belongs_to_a_job_is_left_alone() -> None:
    found = twice(seen(run("", closed=True, seq=9), policies=[policy(""), PolicyRef(run="unknown", version=1)]), 10**6)
    assert found == Removals()


@pytest.mark.parametrize(
    ("about", "between", "goes"),
    [
        (run("live", seq=5), 3600.0, True),
        (run("live", seq=5), 3599.0, False),  # a request that names it may be on its way
        (run("live", seq=4), 10.0**6, False),  # its operation may be done again
        (run("live"), 10.0**6, False),
        (run("over", closed=True), 0.0, True),
        (run("over", seq=5), 0.0, False),  # first its run is closed
        (run("fresh", closed=True), 0.0, False),
    ],
)
def test_a_policy_that_nothing_names_goes(about: RunRecord, between: float, goes: bool) -> None:
    ref = policy(about.session)
    assert twice(seen(about, policies=[ref]), between).policies == ((ref,) if goes else ())


@pytest.mark.parametrize(
    "named",
    [
        {"checkpoints": [checkpoint(policy=policy("live"))]},
        {"samplers": [sampler("live", policy("live"))]},
        {"samplers": [sampler("fresh", policy("live"))]},
        {"inflight": {"live-run": policy("live")}},
    ],
)
def test_a_policy_stays_while_something_names_it(named: dict[str, Any]) -> None:
    about = seen(run("live", seq=9), policies=[policy("live")], **named)
    assert twice(about, 10**6).policies == ()


@pytest.mark.parametrize(
    ("named", "stays"),
    [
        ({"checkpoints": [checkpoint(policy=policy("over"))]}, True),
        ({"samplers": [sampler("live", policy("over"))]}, True),  # another session samples from it
        ({"samplers": [sampler("over", policy("over"))]}, False),
        ({"inflight": {"over-run": policy("over")}}, False),
    ],
)
def test_a_policy_of_an_ended_session_stays_for_others(named: dict[str, Any], stays: bool) -> None:
    about = seen(run("over", closed=True), policies=[policy("over")], **named)
    assert bool(twice(about, 10**6).policies) is not stays


def test_older_versions_go_and_the_one_in_flight_stays() -> None:
    versions = [policy("live", version) for version in (3, 5, 8)]
    about = seen(run("live", seq=9), policies=versions, inflight={"live-run": versions[2]})
    assert twice(about, 3600).policies == tuple(versions[:2])
