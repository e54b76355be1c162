"""How a job goes, as far as one can see it from its events: a fold over them, and words for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.local.printing import accuracy_text
from shared.contracts.jobs import (
    FINISHED,
    Evaluation,
    JobChanged,
    JobPhase,
    JobProgressed,
    JobRecord,
    JobSpec,
    StepReport,
)
from shared.contracts.replicas import ReplicaRecord

RIGHT_OR_WRONG = ("exact_match", "numeric", "regex")
"""Rewards that are 0 or 1."""


@dataclass
class JobView:
    """What is known of a job. Each method that takes an event returns the lines that are news in it."""

    job: str
    steps: int = 0
    phase: JobPhase = "queued"
    reason: str = ""
    reports: dict[int, StepReport] = field(default_factory=dict)
    """By step. A coordinator that comes back may tell of one again."""
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    """By step."""
    measure: str = "accuracy"
    """What the evaluations' numbers are."""
    replicas: Sequence[ReplicaRecord] = ()

    @property
    def step(self) -> int:
        """The newest step that is done."""
        return max(self.reports, default=0)

    @property
    def finished(self) -> bool:
        """Whether nothing more happens to it."""
        return self.phase in FINISHED

    @property
    def first_and_last(self) -> tuple[Evaluation, Evaluation] | None:
        """The evaluations before and after training; None if there are not two."""
        steps = sorted(self.evaluations)
        return (self.evaluations[steps[0]], self.evaluations[steps[-1]]) if len(steps) > 1 else None

    def progressed(self, event: JobProgressed) -> list[str]:
        """Take in a step or an evaluation."""
        self.steps = event.steps
        lines = []
        if event.report is not None and event.report.step not in self.reports:
            self.reports[event.report.step] = event.report
            lines.append(step_line(event.report, event.steps))
        if event.evaluation is not None:
            lines += self._evaluated(event.evaluation)
        return lines

    def changed(self, event: JobChanged) -> list[str]:
        """Take in another phase."""
        lines = [line for evaluation in event.evaluations for line in self._evaluated(evaluation)]
        return lines + self._enter(event.phase, event.reason)

    def recorded(self, record: JobRecord) -> list[str]:
        """Take in the job's own record: events are kept for a week only."""
        self.steps = record.spec.algorithm.steps
        if record.last is not None and record.phase in FINISHED:  # before the end, the event is still to come
            self.reports.setdefault(record.last.step, record.last)
        lines = [line for evaluation in record.evaluations for line in self._evaluated(evaluation)]
        return lines + self._enter(record.phase, record.reason)

    def _enter(self, phase: JobPhase, reason: str) -> list[str]:
        # A phase from before the end that is read late must not bring a finished job back.
        if (phase, reason) == (self.phase, self.reason) or (self.finished and phase not in FINISHED):
            return []
        self.phase, self.reason = phase, reason
        return [f"job {self.job} {phase_text(phase, reason)}"]

    def _evaluated(self, evaluation: Evaluation) -> list[str]:
        if self.evaluations.get(evaluation.step) == evaluation:
            return []
        self.evaluations[evaluation.step] = evaluation
        return [evaluation_line(evaluation, self.measure)]


def step_line(report: StepReport, steps: int) -> str:
    """A step in one line that can be read without a heading."""
    width = len(str(steps))
    return (
        f"step {report.step:>{width}}/{steps}  reward {report.reward:.3f}  loss {report.loss:+.4f}  "
        f"{report.tokens_per_second:.0f} tok/s  staleness {report.staleness:.1f}  "
        f"groups {report.trained_groups} trained, {report.skipped_groups} skipped, {report.dropped_groups} dropped  "
        f"{report.seconds:.1f} s"
    )


def measure(spec: JobSpec) -> str:
    """What to call the mean of an evaluation: an accuracy only where each answer is right or wrong."""
    return "accuracy" if (spec.evaluation.reward or spec.reward).name in RIGHT_OR_WRONG else "reward"


def evaluation_line(evaluation: Evaluation, measured: str = "accuracy") -> str:
    """An evaluation in one line."""
    failed = f", {evaluation.failed} failed" if evaluation.failed else ""
    when = f"after step {evaluation.step}" if evaluation.step else "before training"
    return f"held-out {measured} {when}: {accuracy_text(evaluation)} ({evaluation.tasks} tasks{failed})"


def phase_text(phase: JobPhase, reason: str) -> str:
    """What to say after a job's name."""
    text = {"queued": "is queued", "running": "is running", "paused": "is paused"}.get(phase, phase)
    return f"{text}: {reason}" if reason else text


def activity_line(replicas: Sequence[ReplicaRecord]) -> str:
    """What the services are doing, the idle ones left out."""
    busy = [f"{replica.replica}: {replica.activity}" for replica in replicas if not replica.activity.startswith("idle")]
    return "; ".join(busy) or "all services are idle"
