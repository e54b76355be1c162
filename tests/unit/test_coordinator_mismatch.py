"""The mismatch of sampler and trainer, as the coordinator computes it."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from services.coordinator.advantages import training_data
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.mismatch import MISMATCH, logprob_mismatch
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.episodes import GroupKey, GroupScored, Rollout, Turn
from shared.contracts.jobs import AlgorithmSpec, StepReport
from shared.contracts.policies import PolicyRef
from shared.contracts.training import OperationResult


def turn(prompt: int, logprobs: list[float]) -> Turn:
    tokens = Int32s(range(1, len(logprobs) + 1))
    return Turn(prompt=Int32s([7] * prompt), tokens=tokens, logprobs=Float32s(logprobs), stop_reason="stop")


def group(index: int, version: int | None, *turns: Turn) -> GroupScored:
    rollouts = [Rollout(turns=[each], reward=float(number)) for number, each in enumerate(turns)]
    policy = None if version is None else PolicyRef(run="r", version=version)
    return GroupScored(job="j", group=GroupKey(split="train", index=index), rollouts=rollouts, policy=policy)


def trained(groups: list[GroupScored], shift: dict[int, float]) -> OperationResult:
    """A trainer that differs by `shift` (by index of the datum) at every sampled token, and by 9 elsewhere."""
    data = training_data(groups, AlgorithmSpec())
    logprobs = []
    for number, datum in enumerate(data):
        assert datum.logprobs is not None
        assert datum.weights is not None
        pairs = zip(datum.logprobs, datum.weights, strict=True)
        logprobs.append(Float32s(own + (shift.get(number, 0.0) if mask else 9.0) for own, mask in pairs))
    return OperationResult(request_id="q", run="r", seq=1, logprobs=logprobs)


STEP = OperationResult(request_id="q", run="r", seq=2)


def test_only_sampled_tokens_of_groups_of_the_trained_version_count() -> None:
    groups = [
        group(0, 3, turn(4, [-1.0, -2.0]), turn(2, [-0.5])),
        group(1, 2, turn(4, [-1.0]), turn(2, [-0.5])),
        group(2, 3, turn(4, []), turn(3, [-0.5])),
    ]
    result = trained(groups, {0: 0.25, 1: -0.5, 2: 100.0, 3: 100.0, 4: 0.0})
    assert logprob_mismatch(groups, [result, STEP], 3) == {MISMATCH: pytest.approx((0.25 + 0.25 + 0.5 + 0.0) / 4)}


def test_the_base_model_is_version_0() -> None:
    groups = [group(0, None, turn(4, [-1.0]), turn(2, [-0.5]))]
    assert logprob_mismatch(groups, [trained(groups, {0: 0.5})], 0) == {MISMATCH: pytest.approx(0.25)}


def test_there_is_no_mismatch_where_nothing_can_be_compared() -> None:
    stale = [group(0, 1, turn(4, [-1.0]), turn(2, [-0.5]))]
    assert logprob_mismatch(stale, [trained(stale, {})], 2) == {}
    assert logprob_mismatch(stale, [STEP], 1) == {}
    assert logprob_mismatch([], [], 0) == {}


def test_it_is_a_metric_of_the_job() -> None:
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    metrics.stepped("j", StepReport(step=1, reward=0.0))
    assert registry.get_sample_value("openrl_job_logprob_mismatch", {"job_id": "j"}) is None
    metrics.stepped("j", StepReport(step=2, reward=0.0, metrics={MISMATCH: 1e-6}))
    assert registry.get_sample_value("openrl_job_logprob_mismatch", {"job_id": "j"}) == 1e-6
