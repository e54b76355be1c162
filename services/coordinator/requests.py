"""Requests for groups of episodes. Pure."""

from __future__ import annotations

import msgspec

from shared.contracts.episodes import GroupKey, PlayGroup
from shared.contracts.jobs import EvaluationPlan, JobRecord
from shared.contracts.policies import PolicyRef


def training_group(record: JobRecord, key: GroupKey) -> PlayGroup:
    """Ask for a training group of the newest policy."""
    spec = record.spec
    return PlayGroup(
        job=record.job,
        group=key,
        environment=spec.environment,
        reward=spec.reward,
        base_model=spec.base_model,
        sampling=msgspec.structs.replace(spec.sampling, seed=spec.seed),
        size=spec.algorithm.group_size,
        policy=record.policy,
        task_seed=spec.seed,
        reference_logprobs=spec.algorithm.kl_coeff > 0,
        isolated=_isolated(record),
        owner=record.owner,
    )


def held_out_group(record: JobRecord, plan: EvaluationPlan, index: int) -> PlayGroup:
    """Ask for one held-out task of an evaluation."""
    spec = record.spec
    sampling = msgspec.structs.replace(
        spec.sampling,
        seed=spec.seed,
        temperature=spec.evaluation.temperature,
        max_tokens=spec.evaluation.max_tokens or spec.sampling.max_tokens,
    )
    policy: PolicyRef | None = plan.policy
    return PlayGroup(
        job=record.job,
        group=GroupKey(split="held_out", index=index, round=plan.step),
        environment=spec.environment,
        reward=spec.evaluation.reward or spec.reward,
        base_model=spec.base_model,
        sampling=sampling,
        size=1,
        policy=policy,
        task_seed=spec.seed,
        isolated=_isolated(record),
        owner=record.owner,
    )


def _isolated(record: JobRecord) -> bool:
    asked = record.spec.reproducible
    return record.spec.algorithm.max_staleness == 0 if asked is None else asked
