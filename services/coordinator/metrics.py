"""What a coordinator measures."""

from __future__ import annotations

import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.coordinator.mismatch import MISMATCH
from shared.contracts.jobs import Evaluation, StepReport


class CoordinatorMetrics:
    """The coordinator's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.submitted = Counter(
            "openrl_jobs_submitted_total", "Submissions by outcome", ["outcome"], registry=registry
        )
        self.finished = Counter("openrl_jobs_finished_total", "Jobs by how they ended", ["phase"], registry=registry)
        self.removed = Counter(
            "openrl_removed_total", "What the janitor has put away, by kind", ["what"], registry=registry
        )
        self.running = Gauge("openrl_jobs_running", "Jobs driven here", registry=registry)
        self.step = Gauge("openrl_job_step", "Steps done", ["job"], registry=registry)
        self.reward = Gauge("openrl_job_reward", "Mean reward of the newest step", ["job"], registry=registry)
        self.accuracy = Gauge("openrl_job_held_out_accuracy", "Newest evaluation", ["job"], registry=registry)
        self.staleness = Gauge("openrl_job_staleness", "Mean staleness of the newest step", ["job"], registry=registry)
        self.mismatch = Gauge(
            "openrl_job_logprob_mismatch", "Mean |log p of the trainer - of the sampler|, same tokens, same weights",
            ["job"], registry=registry,
        )  # fmt: skip
        self.tokens = Counter("openrl_job_sampled_tokens_total", "Tokens in used groups", ["job"], registry=registry)
        self.groups = Counter("openrl_job_groups_total", "Groups by outcome", ["job", "outcome"], registry=registry)
        self.step_seconds = Histogram(
            "openrl_job_step_seconds", "Time from step to step", ["job"], buckets=(0.1, 1, 3, 10, 30, 100, 300),
            registry=registry,
        )  # fmt: skip

    def stepped(self, job: str, row: StepReport) -> None:
        """Count a step."""
        self.step.labels(job).set(row.step)
        self.reward.labels(job).set(row.reward)
        self.staleness.labels(job).set(row.staleness)
        if MISMATCH in row.metrics:
            self.mismatch.labels(job).set(row.metrics[MISMATCH])
        self.tokens.labels(job).inc(row.tokens)
        self.step_seconds.labels(job).observe(row.seconds)
        self.groups.labels(job, "trained").inc(row.trained_groups)
        self.groups.labels(job, "skipped").inc(row.skipped_groups)
        self.groups.labels(job, "dropped").inc(row.dropped_groups)

    def evaluated(self, job: str, evaluation: Evaluation) -> None:
        """Count an evaluation. One that measured nothing leaves no figure, not even that of an earlier one."""
        if evaluation.accuracy is not None:
            self.accuracy.labels(job).set(evaluation.accuracy)
            return
        with contextlib.suppress(KeyError):
            self.accuracy.remove(job)
