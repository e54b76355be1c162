"""What a job does next, decided without a mesh."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from services.coordinator import policy
from services.coordinator.advantages import group_advantages, has_signal, training_data, training_loss
from services.coordinator.evaluations import Evaluations
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.operations import step_operations
from services.coordinator.policy import Standing
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.base import Failure
from shared.contracts.episodes import EnvironmentSpec, GroupKey, GroupScored, RewardSpec, Rollout, Turn
from shared.contracts.jobs import AlgorithmSpec, CheckpointSpec, EvaluationSpec, JobRecord, JobSpec
from shared.contracts.policies import PolicyRef
from shared.contracts.training import ForwardBackward, LossSpec, OptimStep, SavePolicy, SaveState


def spec(*, steps: int = 10, groups: int = 4, staleness: int = 1, **algorithm: object) -> JobSpec:
    return JobSpec(
        name="job",
        base_model="tiny",
        environment=EnvironmentSpec(name="arithmetic"),
        reward=RewardSpec(name="exact_match"),
        algorithm=AlgorithmSpec(steps=steps, groups_per_step=groups, max_staleness=staleness, **algorithm),  # type: ignore[arg-type]
    )


def rollout(reward: float, tokens: int = 2, failure: Failure | None = None) -> Rollout:
    turn = Turn(
        prompt=Int32s([1, 2, 3]),
        tokens=Int32s([7] * tokens),
        logprobs=Float32s([-0.5] * tokens),
        stop_reason="stop",
    )
    return Rollout(turns=[turn], reward=reward, failure=failure)


def group(index: int, version: int = 0, rewards: tuple[float, ...] = (0.0, 1.0)) -> GroupScored:
    return GroupScored(
        job="job-1",
        group=GroupKey(split="train", index=index),
        rollouts=[rollout(reward) for reward in rewards],
        policy=PolicyRef(run="job-1", version=version) if version else None,
    )


def simulate(job: JobSpec) -> tuple[list[float], int]:
    """Play a job with everything that is asked for coming back at once: staleness of each group, most outstanding."""
    size = job.algorithm.groups_per_step
    step = updates = most = 0
    outstanding: list[int] = []  # version of each group that is out
    ages: list[float] = []
    training: list[int] = []
    while step < job.algorithm.steps:
        standing = Standing(step=step, updates=updates, training=bool(training), outstanding=len(outstanding))
        outstanding += [updates] * policy.groups_to_ask_for(standing, job)
        most = max(most, len(outstanding))
        if training:
            training, step, updates = [], step + 1, updates + 1
        elif len(outstanding) >= size:
            training, outstanding = outstanding[:size], outstanding[size:]
            ages += [updates - version for version in training]
        else:
            raise AssertionError("the job is stuck")
    return ages, most


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 4))
def test_a_job_uses_every_group_it_asked_for_and_none_is_too_old(steps: int, size: int, staleness: int) -> None:
    ages, most = simulate(spec(steps=steps, groups=size, staleness=staleness))
    assert len(ages) == steps * size
    assert max(ages) <= staleness
    assert most <= (staleness + 1) * size


def test_without_staleness_nothing_is_sampled_while_training() -> None:
    standing = Standing(step=3, updates=3, training=True, outstanding=0)
    assert policy.groups_to_ask_for(standing, spec(staleness=0)) == 0


def test_with_staleness_one_the_next_step_is_sampled_while_training() -> None:
    standing = Standing(step=3, updates=3, training=True, outstanding=0)
    assert policy.groups_to_ask_for(standing, spec(staleness=1, groups=4)) == 4


def test_a_step_takes_the_groups_asked_for_first() -> None:
    chosen = policy.choose([group(5), group(2), group(9), group(1), group(3)], updates=0, spec=spec(groups=3))
    assert [item.group.index for item in chosen.step] == [1, 2, 3]


def test_a_step_waits_until_enough_groups_are_back() -> None:
    assert policy.choose([group(1), group(2)], updates=0, spec=spec(groups=3)).step == ()


def test_groups_older_than_the_maximum_staleness_are_dropped() -> None:
    ready = [group(1, version=1), group(2, version=2), group(3, version=3)]
    chosen = policy.choose(ready, updates=3, spec=spec(groups=2, staleness=1))
    assert [item.group.index for item in chosen.too_old] == [1]
    assert [item.group.index for item in chosen.step] == [2, 3]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=16))
def test_advantages_of_a_group_sum_to_zero(rewards: list[float]) -> None:
    assert math.isclose(sum(group_advantages(rewards, by_deviation=False)), 0.0, abs_tol=1e-9)


def test_advantages_over_the_deviation_have_unit_deviation() -> None:
    advantages = group_advantages([0.0, 0.0, 1.0, 1.0], by_deviation=True)
    assert advantages == pytest.approx([-1, -1, 1, 1], abs=1e-4)


def test_equal_rewards_give_no_data() -> None:
    assert not has_signal(group(0, rewards=(1.0, 1.0, 1.0)))
    assert training_data([group(0, rewards=(1.0, 1.0))], AlgorithmSpec()) == []


def test_data_are_shifted_by_one_and_only_sampled_tokens_count() -> None:
    first, second = training_data([group(0, rewards=(0.0, 1.0))], AlgorithmSpec())
    assert list(first.tokens) == [1, 2, 3, 7]
    assert list(first.targets) == [2, 3, 7, 7]
    assert first.weights is not None
    assert list(first.weights) == [0, 0, 1, 1]
    assert first.logprobs is not None
    assert list(first.logprobs) == [0, 0, -0.5, -0.5]
    assert first.advantages is not None
    assert second.advantages is not None
    assert list(first.advantages) == [0, 0, -0.25, -0.25]  # -1/2, over two episodes
    assert list(second.advantages) == [0, 0, 0.25, 0.25]


def test_the_kl_penalty_pulls_towards_the_base_model() -> None:
    scored = group(0, rewards=(0.0, 1.0))
    turns = [msgspec.structs.replace(r.turns[0], reference_logprobs=Float32s([-0.5, -1.5])) for r in scored.rollouts]
    scored = msgspec.structs.replace(
        scored, rollouts=[msgspec.structs.replace(r, turns=[t]) for r, t in zip(scored.rollouts, turns, strict=True)]
    )
    first, _ = training_data([scored], AlgorithmSpec(kl_coeff=0.5))
    assert first.advantages is not None
    # The second token is e times likelier than under the base model: 0.5 * 1 is taken off its advantage.
    assert list(first.advantages) == pytest.approx([0, 0, -0.25, (-0.5 - 0.5) / 2])


def test_failed_episodes_are_left_out_of_their_group() -> None:
    mixed = msgspec.structs.replace(
        group(0), rollouts=[rollout(1.0), rollout(0.0), rollout(0.0, failure=Failure(message="hung"))]
    )
    assert policy.group_failure(mixed) is None
    assert len(training_data([mixed], AlgorithmSpec())) == 2


@pytest.mark.parametrize(
    ("rollouts", "reason"),
    [
        ([], "no episode was played"),
        ([rollout(0.0, failure=Failure(message="hung"))] * 3, "hung"),
        ([rollout(1.0), rollout(0.0, failure=Failure(message="hung"))], "hung"),
        ([rollout(1.0)], None),
    ],
)
def test_a_group_needs_something_to_compare(rollouts: list[Rollout], reason: str | None) -> None:
    assert policy.group_failure(msgspec.structs.replace(group(0), rollouts=rollouts)) == reason


@pytest.mark.parametrize(("step", "due"), [(0, True), (3, False), (4, True), (8, True), (10, True)])
def test_evaluations_come_before_during_and_after(step: int, due: bool) -> None:
    assert policy.evaluations_due(EvaluationSpec(tasks=2, every=4), step, 10, done=set()) is due
    assert not policy.evaluations_due(EvaluationSpec(tasks=2, every=4), step, 10, done={step})
    assert not policy.evaluations_due(EvaluationSpec(tasks=0, every=4), step, 10, done=set())


def test_an_evaluation_ends_with_its_last_answer_and_counts_failures_as_zero_answers() -> None:
    evaluations = Evaluations(EvaluationSpec(tasks=3))
    evaluations.begin(10)
    answers = [
        GroupScored(job="j", group=GroupKey(split="held_out", index=0, round=10), rollouts=[rollout(1.0)]),
        GroupScored(job="j", group=GroupKey(split="held_out", index=1, round=10), failure=Failure(message="x")),
        GroupScored(job="j", group=GroupKey(split="held_out", index=2, round=10), rollouts=[rollout(0.0)]),
    ]
    assert [evaluations.take(answer) for answer in answers[:2]] == [None, None]
    assert not evaluations.expects(answers[0].group)
    outcome = evaluations.take(answers[2])
    assert outcome is not None
    assert (outcome.accuracy, outcome.tasks, outcome.failed) == (0.5, 3, 1)


def test_an_evaluation_of_which_every_task_failed_measures_nothing() -> None:
    evaluations = Evaluations(EvaluationSpec(tasks=1))
    evaluations.begin(0)
    key = GroupKey(split="held_out", index=0, round=0)
    outcome = evaluations.take(GroupScored(job="j", group=key, failure=Failure(message="x")))
    assert outcome is not None
    assert (outcome.accuracy, outcome.tasks, outcome.failed) == (None, 1, 1)
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    name, labels = "openrl_job_held_out_accuracy", {"job_id": "j"}
    metrics.evaluated("j", outcome)
    assert registry.get_sample_value(name, labels) is None
    metrics.evaluated("j", msgspec.structs.replace(outcome, accuracy=0.0))
    assert registry.get_sample_value(name, labels) == 0.0
    metrics.evaluated("j", outcome)
    assert registry.get_sample_value(name, labels) is None


def test_a_step_goes_on_after_a_restart_and_stands_still_in_a_pause() -> None:
    record = JobRecord(job="job-1", run="job-1", spec=spec())
    assert policy.step_began(record, 50.0) == 50.0
    begun = msgspec.structs.replace(record, step_began=50.0)
    assert policy.step_began(begun, 70.0) == 50.0
    paused = msgspec.structs.replace(begun, paused=60.0)
    assert policy.step_began(paused, 90.0) == 80.0


def test_penalties_are_divided_like_the_advantages_that_they_weigh_against() -> None:
    groups = [group(0, rewards=(0.0, 1.0)), group(1, rewards=(1.0, 1.0)), group(2, rewards=(0.0, 1.0))]
    algorithm = AlgorithmSpec(loss="stable_reinforce", loss_params={"kl_coeff": 0.5})
    assert training_loss(groups, algorithm).params == {"clip_high": 2.0, "kl_coeff": 0.5 / 4}
    assert training_loss(groups, AlgorithmSpec(loss="dro")).params == {"beta": 0.05 / 4}
    assert training_loss(groups[1:2], AlgorithmSpec(loss="dro")).params == {"beta": 0.05}
    clipped = AlgorithmSpec(loss="gspo", loss_params={"clip_low": 0.9})
    assert training_loss(groups, clipped).params == {"clip_low": 0.9, "clip_high": 1.2}


LOSS = LossSpec(name="importance_sampling")


def record(**changes: object) -> JobRecord:
    base = JobRecord(job="job-1", run="job-1", spec=spec(steps=4))
    return msgspec.structs.replace(base, **changes)


def test_a_step_trains_steps_and_publishes_in_order() -> None:
    data = training_data([group(0)], AlgorithmSpec())
    operations = step_operations(record(step=1, updates=1), 5, data, LOSS)
    assert [type(operation) for operation in operations] == [ForwardBackward, OptimStep, SavePolicy]
    assert [operation.seq for operation in operations] == [5, 6, 7]
    assert isinstance(operations[2], SavePolicy)
    assert operations[2].version == 2
    assert operations == step_operations(record(step=1, updates=1), 5, data, LOSS), (
        "the same plan gives the same operations"
    )


def test_the_first_step_begins_the_run() -> None:
    operations = step_operations(record(), 0, training_data([group(0)], AlgorithmSpec()), LOSS)
    assert [(type(operation).__name__, operation.seq) for operation in operations] == [
        ("CreateRun", 0),
        ("ForwardBackward", 1),
        ("OptimStep", 2),
        ("SavePolicy", 3),
    ]


def test_a_step_without_data_does_nothing_to_the_run() -> None:
    assert step_operations(record(step=1), 5, [], LOSS) == []


def test_the_last_step_leaves_a_policy_and_a_checkpoint() -> None:
    kinds = [type(operation) for operation in step_operations(record(step=3), 5, [], LOSS)]
    assert kinds == [SavePolicy, SaveState]


def test_checkpoints_are_named_after_their_step() -> None:
    job = msgspec.structs.replace(spec(steps=9), checkpoint=CheckpointSpec(every=2))
    operations = step_operations(record(spec=job, step=3), 5, [], LOSS)
    assert [operation.name for operation in operations if isinstance(operation, SaveState)] == ["step-4"]


def test_policies_that_may_still_be_asked_for_are_kept() -> None:
    assert policy.versions_to_delete({1, 2, 3, 4, 5}, needed={3}, keep=2) == [1, 2]


def test_rewards_inside_mixtures_are_named() -> None:
    mixture = RewardSpec(name="weighted", params={"parts": [{"name": "regex"}, {"name": "numeric"}]})
    assert policy.reward_names(mixture) == ["weighted", "regex", "numeric"]
