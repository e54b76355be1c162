"""Jobs: what a user asks for, and how it goes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from shared.contracts.base import Contract, Name, Strict
from shared.contracts.episodes import EnvironmentSpec, GroupKey, RewardSpec
from shared.contracts.policies import LoraSpec, PolicyRef
from shared.contracts.sampling import MOST_TOKENS, SamplingParams

PolicyLoss = Literal["importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"]
MOST_STEPS = 1_000_000
Steps = Annotated[int, msgspec.Meta(ge=0, le=MOST_STEPS)]
GROUP_LIMIT = 4096
"""Of groups in a step, and of episodes in a group. What both may be together, `services.coordinator.limits` says."""


class AlgorithmSpec(Strict):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300)."""

    steps: Annotated[int, msgspec.Meta(ge=1, le=MOST_STEPS)] = 40
    group_size: Annotated[int, msgspec.Meta(ge=2, le=GROUP_LIMIT)] = 8
    """Episodes of one task; their rewards are compared with each other."""
    groups_per_step: Annotated[int, msgspec.Meta(ge=1, le=GROUP_LIMIT)] = 16
    loss: PolicyLoss = "importance_sampling"
    loss_params: dict[str, float] = {}
    """For instance `clip_low` and `clip_high` of `ppo`; docs/losses.md has all."""
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=10)] = 4e-4
    normalize_by_deviation: bool = False
    """Divide advantages by the group's standard deviation, as the first GRPO did (Liu et al. 2025, arXiv:2503.20783,
    argue against it)."""
    kl_coeff: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0
    """Penalty on the log-ratio to the base model, taken off the advantages. Costs one more pass of the base model."""
    max_staleness: Annotated[int, msgspec.Meta(ge=0, le=64)] = 1
    """Optimizer steps that may lie between the policy that sampled a group and the weights it trains. 0: strictly
    on policy and, on one machine, reproducible; 1: sampling and training overlap."""
    beta1: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.95
    eps: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1e-12
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    grad_clip_norm: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0


class EvaluationSpec(Strict):
    """Held-out tasks, never trained on, answered before, during and after training."""

    tasks: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 64
    """0: no evaluation."""
    every: Steps = 10
    """In steps. 0: only before and after."""
    reward: RewardSpec | None = None
    """What counts. None: the job's own reward."""
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)] | None = None
    """None: as in training."""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0


class CheckpointSpec(Strict):
    """Named checkpoints of weights and optimizer. Recovery does not need them: it has snapshots of its own."""

    every: Steps = 0
    """In steps. 0: only at the end."""


class JobSpec(Strict):
    """One RL job."""

    name: Name
    base_model: Annotated[str, msgspec.Meta(min_length=1)]
    environment: EnvironmentSpec
    reward: RewardSpec
    algorithm: AlgorithmSpec = AlgorithmSpec()
    lora: LoraSpec = LoraSpec()
    sampling: SamplingParams = SamplingParams(max_tokens=256)
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    priority: Annotated[int, msgspec.Meta(ge=-1000, le=1000)] = 0
    """Higher goes first where jobs wait for a place at the coordinator."""
    reproducible: bool | None = None
    """Sample every group in a batch of its own, so that two runs with the same seed give the same numbers on the same
    machine. Slower. None: only when `max_staleness` is 0, since otherwise timing decides anyhow."""


class SubmitJob(Contract):
    """Ask for a job. The body of `rl.v1.jobs.submit`, most often JSON from somebody else's program."""

    spec: Any
    """A `JobSpec`. Read as plain data first, so that one answer can name every error in it."""
    request_id: str | None = None
    """The answer comes on `rl.v1.results.<request_id>`: letters, digits, '-' and '_', dots between. Asking again with
    the same one gives the same job. None: no answer; the job's events tell."""
    owner: str = "default"


class Submission(Contract):
    """A request for a job that was granted; the value in the `submissions` bucket, by request id."""

    job: str
    seq: int
    """Place of the request in its stream."""


class FieldError(Contract):
    """Something wrong with one field."""

    path: str
    """For instance `algorithm.steps`."""
    message: str


class JobAnswer(Contract, tag_field="kind", tag="job"):
    """The answer to a submission, or to another command about a job."""

    request_id: str
    job: str | None = None
    """None: refused, and `errors` says why."""
    errors: list[FieldError] = []


class ControlJob(Contract):
    """Cancel, pause, resume or delete a job; which one, the subject says."""

    job: str
    request_id: str | None = None


JobPhase = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Wanted = Literal["run", "pause", "cancel"]
FINISHED: frozenset[JobPhase] = frozenset({"succeeded", "failed", "cancelled"})


class StepPlan(Contract):
    """A step that has been decided.

    It is written down before its operations are published, so that a coordinator that comes back publishes the same
    ones again and not others.
    """

    step: int
    first_seq: int
    groups: list[GroupKey] = []


class EvaluationPlan(Contract):
    """An evaluation that has begun."""

    step: int
    policy: PolicyRef | None = None


class Evaluation(Contract):
    """The outcome of one evaluation."""

    step: int
    accuracy: float | None
    """Mean reward over the held-out tasks that were scored. None: none was, so nothing has been measured."""
    tasks: int
    failed: int = 0


class StepReport(Contract):
    """One row of the step table."""

    step: int
    reward: float
    """Mean over the step's episodes."""
    loss: float = 0.0
    tokens: int = 0
    """Sampled tokens in the step's episodes."""
    trained_groups: int = 0
    skipped_groups: int = 0
    """All rewards equal: nothing to learn."""
    dropped_groups: int = 0
    """Too old, or failed."""
    staleness: float = 0.0
    """Mean over the step's groups, in optimizer steps."""
    seconds: float = 0.0
    sample_seconds: float = 0.0
    train_seconds: float = 0.0
    tokens_per_second: float = 0.0
    metrics: dict[str, float] = {}


class JobRecord(Contract):
    """A job as the `jobs` bucket knows it: enough to go on from after a restart."""

    job: str
    spec: JobSpec
    phase: JobPhase = "queued"
    wanted: Wanted = "run"
    """What its owner last asked for; whoever drives the job follows."""
    reason: str = ""
    owner: str = "default"
    run: str = ""
    step: int = 0
    """Optimizer steps that are done."""
    next_seq: int = 0
    """Of the run's log."""
    next_group: int = 0
    """Index of the next training group to ask for."""
    outstanding: list[GroupKey] = []
    """What `asked` holds now, as earlier versions wrote it."""
    updates: int = 0
    """Optimizer updates: steps in which there was something to learn. Also the version of the newest policy."""
    policy: PolicyRef | None = None
    """The newest policy; None while it is still the base model."""
    plan: StepPlan | None = None
    evaluating: list[EvaluationPlan] = []
    evaluations: list[Evaluation] = []
    skipped_groups: int = 0
    dropped_groups: int = 0
    failed_groups: int = 0
    adapter: str = ""
    """Where the newest policy's files lie, for people."""
    created: float = 0.0
    """Seconds since 1970."""
    finished: float | None = None
    last: StepReport | None = None
    step_began: float = 0.0
    """When the present step began, in seconds since 1970, plus what the job has been paused since. 0: it has not."""
    paused: float | None = None
    """Since when it is paused, in seconds since 1970."""
    asked: list[tuple[int, int]] = []
    """Training groups that were asked for and not yet used, by index: the first and the last of each unbroken row."""


class JobStanding(Contract):
    """The part of a `JobRecord` that says whether the job goes on."""

    phase: JobPhase = "queued"


class JobProgressed(Contract):
    """A step or an evaluation is done (event)."""

    job: str
    step: int
    steps: int
    report: StepReport | None = None
    evaluation: Evaluation | None = None


class JobChanged(Contract):
    """A job entered another phase (event)."""

    job: str
    phase: JobPhase
    reason: str = ""
    evaluations: list[Evaluation] = []
    policy: PolicyRef | None = None
