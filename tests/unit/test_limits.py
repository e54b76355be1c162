"""Upper limits of a job, and that what is written down about the largest one fits the bus."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator import policy
from services.coordinator.limits import MOST_EVALUATIONS, MOST_GROUPS_OUT, MOST_SPEC_BYTES
from services.coordinator.records import LONGEST_REASON
from services.coordinator.window import Window
from shared import wire
from shared.contracts.episodes import EnvironmentSpec, GroupKey, RewardSpec
from shared.contracts.jobs import (
    GROUP_LIMIT,
    MOST_STEPS,
    AlgorithmSpec,
    Evaluation,
    EvaluationSpec,
    JobRecord,
    JobSpec,
    StepPlan,
)
from tests.unit.test_validation import errors_of, job

NATS_LIMIT = 1 << 20


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"algorithm": {"steps": 10**6 + 1}}, "algorithm.steps", "<= 1000000, got 1000001"),
        ({"algorithm": {"groups_per_step": 100_000}}, "algorithm.groups_per_step", "<= 4096, got 100000"),
        ({"algorithm": {"group_size": 4097}}, "algorithm.group_size", "<= 4096"),
        (
            {"algorithm": {"groups_per_step": 4096, "group_size": 17}},
            "algorithm.groups_per_step",
            "4096 groups of 17 are 69632 episodes in a step; the limit is 65536: take fewer groups",
        ),
        ({"algorithm": {"max_staleness": 65}}, "algorithm.max_staleness", "<= 64"),
        (
            {"algorithm": {"max_staleness": 64, "groups_per_step": 253}},
            "algorithm.max_staleness",
            "with 253 groups in a step, 16445 are out at the same time; the limit is 16384",
        ),
        ({"algorithm": {"learning_rate": 11}}, "algorithm.learning_rate", "<= 10.0, got 11"),
        ({"algorithm": {"learning_rate": float("inf")}}, "algorithm.learning_rate", "<= 10.0"),
        ({"algorithm": {"kl_coeff": float("inf")}}, "algorithm.kl_coeff", "<= 1000.0"),
        ({"algorithm": {"weight_decay": float("nan")}}, "algorithm.weight_decay", ">= 0.0"),
        ({"evaluation": {"tasks": 10_001}}, "evaluation.tasks", "<= 10000"),
        (
            {"algorithm": {"steps": 2001}, "evaluation": {"every": 1}},
            "evaluation.every",
            "1 makes 2001 evaluations in 2001 steps; the limit is 2000: evaluate less often",
        ),
        ({"sampling": {"max_tokens": 10**6 + 1}}, "sampling.max_tokens", "<= 1000000"),
        ({"environment": {"name": "arithmetic", "episode_timeout_s": 1e9}}, "environment.episode_timeout_s", "604800"),
        ({"environment": {"name": "arithmetic", "params": {"text": "x" * (1 << 18)}}}, "", "the limit is 262144"),
    ],
)
def test_what_is_too_large_is_refused_with_its_limit(change: dict[str, Any], path: str, message: str) -> None:
    found = errors_of(job(**change))
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize(
    "algorithm",
    [
        {"steps": MOST_STEPS, "groups_per_step": 4096, "group_size": 16, "max_staleness": 3},
        {"steps": MOST_STEPS, "groups_per_step": 16, "group_size": 4096, "max_staleness": 64},
    ],
)
def test_the_largest_jobs_are_taken(algorithm: dict[str, Any]) -> None:
    assert errors_of(job(algorithm=algorithm, evaluation={"tasks": 10_000, "every": 500})) == {}


def test_the_largest_record_fits_the_bus() -> None:
    """With as many holes among the outstanding groups as there can be, and numbers as long as they get."""
    spec = JobSpec(
        name="x" * 63,
        base_model="org/model",
        environment=EnvironmentSpec(name="arithmetic", params={"text": "x" * MOST_SPEC_BYTES}),
        reward=RewardSpec(name="exact_match"),
        algorithm=AlgorithmSpec(steps=MOST_STEPS, groups_per_step=GROUP_LIMIT, max_staleness=3),
        evaluation=EvaluationSpec(tasks=10_000, every=500),
    )
    last = MOST_STEPS * GROUP_LIMIT
    keys = [GroupKey(split="train", index=last - number) for number in range(GROUP_LIMIT)]
    outcome = Evaluation(step=MOST_STEPS, accuracy=2 / 3, tasks=10_000, failed=10_000)
    record = JobRecord(
        job="x" * 80,
        spec=spec,
        reason="x" * LONGEST_REASON,
        asked=policy.spans(range(last - 2 * MOST_GROUPS_OUT, last, 2)),
        plan=StepPlan(step=MOST_STEPS, first_seq=last, groups=keys),
        evaluations=[outcome] * (MOST_EVALUATIONS + 2),
    )
    assert len(wire.encode(record, json=True)) < NATS_LIMIT - 4096


@given(st.sets(st.integers(0, 60)))
def test_outstanding_groups_are_kept_as_unbroken_rows(indexes: set[int]) -> None:
    rows = policy.spans(indexes)
    record = msgspec.structs.replace(EMPTY, asked=rows)
    assert policy.indexes_asked_for(record) == indexes
    assert all(before[1] + 1 < after[0] for before, after in itertools.pairwise(rows))


def test_outstanding_groups_of_an_earlier_version_are_read() -> None:
    record = msgspec.structs.replace(EMPTY, outstanding=[GroupKey(split="train", index=index) for index in (3, 4)])
    assert policy.indexes_asked_for(record) == {3, 4}


EMPTY = JobRecord(
    job="j",
    spec=JobSpec(
        name="j",
        base_model="tiny",
        environment=EnvironmentSpec(name="arithmetic"),
        reward=RewardSpec(name="exact_match"),
    ),
)


def test_a_job_that_keeps_failing_rests_longer_and_not_for_ever() -> None:
    rests = [policy.retry_seconds(failures) for failures in (1, 2, 3, 10, 10_000)]
    assert rests == [2, 4, 8, 60, 60]


def test_a_window_is_refilled_as_groups_come_back_and_leaves_out_what_has_come() -> None:
    keys = [GroupKey(split="held_out", index=index) for index in range(6)]
    come = {keys[2]}
    window = Window(2)
    window.add(keys)
    assert window.next(1.0, lambda key: key not in come) == keys[:2]
    assert window.next(2.0, lambda key: key not in come) == []
    window.back(keys[0])
    assert window.next(3.0, lambda key: key not in come) == [keys[3]]
    assert window.overdue(10.0, 8.0) == [keys[1]]
    assert window.next(10.0, lambda key: key not in come) == [keys[4]]
    window.back(keys[5])  # never asked for by this one
    assert window.next(11.0, lambda key: key not in come) == []
