"""One example of every message that travels, with every field set to something other than its default."""

from __future__ import annotations

from typing import Any

import msgspec

from shared import topology
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.base import Failure
from shared.contracts.blobs import BlobRef
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord, SaveSpec
from shared.contracts.checks import CheckAnswer, CheckEnvironment, CheckReward
from shared.contracts.episodes import (
    EnvironmentSpec,
    Episode,
    GroupKey,
    GroupScored,
    Message,
    PlayGroup,
    RewardSpec,
    Rollout,
    ScoreGroup,
    Task,
    Turn,
)
from shared.contracts.jobs import (
    AlgorithmSpec,
    CheckpointSpec,
    ControlJob,
    Evaluation,
    EvaluationPlan,
    EvaluationSpec,
    FieldError,
    JobAnswer,
    JobChanged,
    JobProgressed,
    JobRecord,
    JobSpec,
    StepPlan,
    StepReport,
    Submission,
    SubmitJob,
)
from shared.contracts.placement import (
    GpuRecord,
    GroupStanding,
    NodeRecord,
    PlacementRecord,
    PlanRecord,
    ReplicaPlan,
    ScalingDecided,
)
from shared.contracts.policies import LoraSpec, PolicyPublished, PolicyRecord, PolicyRef
from shared.contracts.replicas import ReplicaRecord
from shared.contracts.results import DeadLetter, DeliveryMark, RequestFailed
from shared.contracts.sampling import SampledSequence, SampleRequest, SampleResult, SamplingParams, TopLogprobs
from shared.contracts.sessions import Heartbeat, RunActivity, SamplerRecord, SessionRecord
from shared.contracts.tenants import Audited, KeyRecord, TenantLimits, TenantRecord, UsageRecorded
from shared.contracts.training import (
    AdamParams,
    CreateRun,
    Datum,
    ForwardBackward,
    Lease,
    LoadState,
    LossSpec,
    OperationResult,
    OptimStep,
    Refused,
    RunRecord,
    SaveExternal,
    SavePolicy,
    SaveState,
    SnapshotRecord,
)

BLOB = BlobRef(key="a/b.bin", sha256="00" * 32, size=7)
POLICY = PolicyRef(run="job-1", version=3)
LORA = LoraSpec(rank=8, alpha=16.0, seed=5, train_attn=False, train_mlp=True, train_unembed=True)
SAMPLING = SamplingParams(max_tokens=9, temperature=0.5, top_p=0.75, top_k=40, stop=["\n", 2], seed=11)
RECORD = PolicyRecord(policy=POLICY, base_model="org/model", lora=LORA, config=BLOB, weights=BLOB, owner="team")
ENVIRONMENT = EnvironmentSpec(name="arithmetic", params={"maximum": 9}, episode_timeout_s=12.5)
REWARD = RewardSpec(name="exact_match", params={"case_insensitive": True}, timeout_s=3.5)
KEY = GroupKey(split="held_out", index=4, round=2)
TASK = Task(question="1+1?", answer="2", metadata={"level": 1})
TURN = Turn(
    prompt=Int32s([1, 2, 3]),
    tokens=Int32s([4, 5]),
    logprobs=Float32s([-0.25, -0.5]),
    stop_reason="length",
    reference_logprobs=Float32s([-1.0, -2.0]),
)
FAILURE = Failure(message="no such policy", kind="user")
SOURCE = CheckpointKey(run="s-1:train:0", kind="training", name="step-10")
SAVE = SaveSpec(name="step-20", ttl_seconds=3600, overwrite=True, user_metadata={"note": "good"})
CHECKPOINT = CheckpointRecord(
    key=SOURCE, base_model="org/model", lora=LORA, owner="team", seq=12, created=100.5, size=21, state=BLOB,
    policy=POLICY, files={"adapter_config.json": BLOB}, encrypted=True, expires=200.5, public=True,
    user_metadata={"note": "good"},
)  # fmt: skip
HEAD: dict[str, Any] = {"run": "job-1", "seq": 4, "request_id": "job-1.4", "owner": "team"}
REPORT = StepReport(
    step=3, reward=0.5, loss=-0.25, tokens=99, trained_groups=3, skipped_groups=1, dropped_groups=2, staleness=0.75,
    seconds=4.0, sample_seconds=2.0, train_seconds=1.5, tokens_per_second=24.75, metrics={"loss:sum": -0.25},
)  # fmt: skip
EVALUATION = Evaluation(step=10, accuracy=0.75, tasks=64, failed=1)
SPEC = JobSpec(
    name="first",
    base_model="org/model",
    environment=ENVIRONMENT,
    reward=REWARD,
    algorithm=AlgorithmSpec(
        steps=3, group_size=4, groups_per_step=2, loss="ppo", loss_params={"clip_low": 0.75}, learning_rate=0.125,
        normalize_by_deviation=True, kl_coeff=0.5, max_staleness=2, beta1=0.5, beta2=0.75, eps=0.25, weight_decay=0.5,
        grad_clip_norm=1.5,
    ),
    lora=LORA,
    sampling=SAMPLING,
    evaluation=EvaluationSpec(tasks=5, every=2, reward=REWARD, max_tokens=7, temperature=0.5),
    checkpoint=CheckpointSpec(every=4),
    seed=6,
    priority=2,
    reproducible=True,
)  # fmt: skip

MESSAGES: dict[str, tuple[topology.Channel[Any], Any]] = {
    "submit": (topology.SUBMIT, SubmitJob(spec={"name": "first"}, request_id="r", owner="team")),
    "cancel": (topology.CANCEL, ControlJob(job="first-1", request_id="r")),
    "pause": (topology.PAUSE, ControlJob(job="first-1", request_id="r")),
    "resume": (topology.RESUME, ControlJob(job="first-1", request_id="r")),
    "create_run": (topology.OPERATIONS, CreateRun(**HEAD, base_model="org/model", lora=LORA)),
    "create_run_loaded": (
        topology.OPERATIONS,
        CreateRun(**HEAD, base_model="org/model", lora=LORA, source=SOURCE, optimizer=True),
    ),
    "forward_backward": (
        topology.OPERATIONS,
        ForwardBackward(
            **HEAD,
            data=[
                Datum(
                    tokens=Int32s([1, 2]),
                    targets=Int32s([2, 3]),
                    weights=Float32s([0.0, 1.0]),
                    logprobs=Float32s([-0.5, -0.25]),
                    advantages=Float32s([0.0, 2.0]),
                )
            ],
            loss=LossSpec(name="cispo", params={"clip_high": 4.0}),
            forward_only=True,
        ),
    ),
    "forward_backward_gspo": (
        topology.OPERATIONS,
        ForwardBackward(
            **HEAD,
            data=[
                Datum(
                    tokens=Int32s([1, 2]),
                    targets=Int32s([2, 3]),
                    weights=Float32s([0.0, 1.0]),
                    logprobs=Float32s([-0.5, -0.25]),
                    advantages=Float32s([0.0, 2.0]),
                    ratio_mask=Float32s([1.0, 1.0]),
                )
            ],
            loss=LossSpec(name="gspo", params={"clip_low": 0.75, "clip_high": 1.25}),
            forward_only=True,
        ),
    ),
    "forward_backward_wide": (
        topology.OPERATIONS,
        ForwardBackward(
            **HEAD,
            data=[
                Datum(
                    tokens=Int32s([1, 2]),
                    targets=Int32s([2, 3, 4, 5]),
                    weights=Float32s([0.75, 0.25, -0.5, 0.0]),
                    targets_per_token=2,
                )
            ],
            loss=LossSpec(name="cross_entropy"),
            forward_only=True,
        ),
    ),
    "optim_step": (
        topology.OPERATIONS,
        OptimStep(
            **HEAD,
            adam=AdamParams(
                learning_rate=0.5, beta1=0.25, beta2=0.5, eps=0.125, weight_decay=0.25, grad_clip_norm=2.0
            ),
        ),
    ),
    "save_policy": (topology.OPERATIONS, SavePolicy(**HEAD, version=3)),
    "save_state": (topology.OPERATIONS, SaveState(**HEAD, name="final")),
    "save_policy_recorded": (
        topology.OPERATIONS, SavePolicy(**HEAD, version=4, checkpoint=SAVE, inflight=True)
    ),
    "save_state_recorded": (topology.OPERATIONS, SaveState(**HEAD, name="step-20", checkpoint=SAVE)),
    "save_external": (topology.OPERATIONS, SaveExternal(**HEAD, checkpoint=SAVE, recipients=["age1xyz"])),
    "load_state": (topology.OPERATIONS, LoadState(**HEAD, source=SOURCE, optimizer=True)),
    "refused": (topology.OPERATIONS, Refused(**HEAD, failure=FAILURE)),
    "sample": (
        topology.SAMPLES,
        SampleRequest(
            request_id="asker.1", base_model="org/model", prompt=Int32s([1, 2]), params=SAMPLING, num_samples=4,
            policy=POLICY, prompt_logprobs=True, isolated=True, owner="team",
        ),
    ),
    "sample_scored": (
        topology.SAMPLES,
        SampleRequest(
            request_id="asker.1", base_model="org/model", prompt=Int32s([1, 2]), num_samples=4, owner="team",
            params=SamplingParams(max_tokens=9, stop="\n\n"), topk_prompt_logprobs=2, topk_sample_logprobs=3,
            target_logprobs=Int32s([3, -1]), target_width=2, prompt_logprobs_last_n=1,
        ),
    ),
    "sample_of_session": (
        topology.SAMPLES,
        SampleRequest(request_id="s-1.sample-0.4", base_model="org/model", prompt=Int32s([1, 2]), session="s-1"),
    ),
    "play_group": (
        topology.GROUPS,
        PlayGroup(
            job="first-1", group=KEY, environment=ENVIRONMENT, reward=REWARD, base_model="org/model",
            sampling=SAMPLING, size=4, policy=POLICY, task_seed=3, reference_logprobs=True, isolated=True, owner="team",
        ),
    ),
    "score_group": (
        topology.PLAYED,
        ScoreGroup(
            job="first-1", group=KEY, reward=REWARD, task=TASK, policy=POLICY, play_seconds=1.5, owner="team",
            episodes=[
                Episode(
                    turns=[TURN], messages=[Message(role="user", content="1+1?")], reply="2", environment_reward=0.5,
                    failure=FAILURE,
                )
            ],
        ),
    ),
    "group_scored": (
        topology.SCORED,
        GroupScored(
            job="first-1", group=KEY, policy=POLICY, task=TASK, play_seconds=1.5, failure=FAILURE,
            rollouts=[Rollout(turns=[TURN], reward=0.5, components={"format": 1.0}, text="2", failure=FAILURE)],
        ),
    ),
    "operation_result": (
        topology.ANSWERS,
        OperationResult(
            request_id="job-1.4", run="job-1", seq=4, metrics={"loss:sum": 1.5}, logprobs=[Float32s([-0.5])],
            policy=RECORD, checkpoint=BLOB,
        ),
    ),
    "operation_timed": (
        topology.ANSWERS,
        OperationResult(request_id="s-1.train-0.13", run="s-1:train:0", seq=13, op="optim_step", submitted=1.5),
    ),
    "operation_recorded": (
        topology.ANSWERS, OperationResult(request_id="s-1.train-0.12", run="s-1:train:0", seq=12, recorded=CHECKPOINT)
    ),
    "sample_result": (
        topology.ANSWERS,
        SampleResult(
            request_id="asker.1", prompt_logprobs=Float32s([-1.0, -0.5]), policy=POLICY, queue_seconds=0.5, seconds=1.5,
            sequences=[SampledSequence(tokens=Int32s([4]), logprobs=Float32s([-0.25]), stop_reason="stop")],
        ),
    ),
    "sample_result_scored": (
        topology.ANSWERS,
        SampleResult(
            request_id="asker.1", queue_seconds=0.5, seconds=1.5, target_logprobs=Float32s([-0.5, -1.5]),
            top_prompt_logprobs=TopLogprobs(width=1, ids=Int32s([0, 7]), logprobs=Float32s([-99999.0, -0.25])),
            sequences=[
                SampledSequence(
                    tokens=Int32s([4]), logprobs=Float32s([-0.25]), stop_reason="stop",
                    top=TopLogprobs(width=2, ids=Int32s([4, 5]), logprobs=Float32s([-0.25, -2.5])),
                )
            ],
        ),
    ),
    "job_answer": (
        topology.ANSWERS,
        JobAnswer(request_id="r", job="first-1", errors=[FieldError(path="seed", message="wrong")]),
    ),
    "delete": (topology.DELETE, ControlJob(job="first-1", request_id="r")),
    "check_environment": (
        topology.ENVIRONMENT_CHECKS,
        CheckEnvironment(
            request_id="r", name="arithmetic", params={"min": 1}, path="environments[0]", seed=3, held_out=4
        ),
    ),
    "check_reward": (
        topology.REWARD_CHECKS,
        CheckReward(request_id="r", name="regex", params={"pattern": "a"}, path="evaluation.reward"),
    ),
    "check_answer": (
        topology.ANSWERS, CheckAnswer(request_id="r", errors=[FieldError(path="reward.params", message="wrong")])
    ),
    "request_failed": (topology.ANSWERS, RequestFailed(request_id="r", failure=FAILURE)),
    "policy_published": (topology.POLICIES_PUBLISHED, PolicyPublished(record=RECORD, seq=7)),
    "job_progressed": (
        topology.JOB_PROGRESS,
        JobProgressed(job="first-1", step=3, steps=10, report=REPORT, evaluation=EVALUATION),
    ),
    "job_progressed_unmeasured": (
        topology.JOB_PROGRESS,
        JobProgressed(
            job="first-1", step=3, steps=10, report=REPORT,
            evaluation=Evaluation(step=10, accuracy=None, tasks=64, failed=64),
        ),
    ),
    "job_changed": (
        topology.JOB_PHASES,
        JobChanged(job="first-1", phase="failed", reason="why", evaluations=[EVALUATION], policy=POLICY),
    ),
    "scaling_decided": (
        topology.SCALING,
        ScalingDecided(
            group="smollm2-samplers", decision="start", reason="why", wanted=3, have=2, at=100.5, cause="panic",
            replica="smollm2-samplers-2", gpus=["n1/0"], replaces="smollm2-samplers-0", dry_run=True,
        ),
    ),
    "dead_letter": (
        topology.DEAD_LETTERS,
        DeadLetter(stream="SAMPLE", subject="s", reason="why", deliveries=5, body=b"\x00\x01", headers={"a": "b"}),
    ),
    "used": (
        topology.USED,
        UsageRecorded(
            owner="team", kind="prompt", tokens=99, begin=100.5, end=110.5, base_model="org/model", session="s-1",
            cached=True,
        ),
    ),
    "audited": (
        topology.AUDITS,
        Audited(at=100.5, owner="team", event="checkpoint_published", details={"checkpoint": "weights/step-10"}),
    ),
}  # fmt: skip
"""By file name: the channel it travels on, and the message."""
for _name in (
    "create_run", "forward_backward", "optim_step", "save_policy", "save_state", "save_external", "load_state",
    "refused", "operation_result", "sample", "sample_result",
):  # fmt: skip
    _channel, _message = MESSAGES[_name]
    MESSAGES[f"{_name}_noted"] = (_channel, msgspec.structs.replace(_message, note="s-1:sample:2"))

RECORDS: dict[str, tuple[topology.Bucket[Any], Any]] = {
    "run": (
        topology.RUNS,
        RunRecord(
            run="job-1", base_model="org/model", lora=LORA, owner="team",
            snapshot=SnapshotRecord(seq=3, stream_seq=9, state=BLOB), closed=True,
        ),
    ),
    "job": (
        topology.JOB_RECORDS,
        JobRecord(
            job="first-1", spec=SPEC, phase="running", wanted="pause", reason="why", owner="team", run="job-1", step=2,
            next_seq=7, next_group=6, outstanding=[KEY], updates=2, policy=POLICY,
            plan=StepPlan(step=2, first_seq=7, groups=[KEY]), evaluating=[EvaluationPlan(step=2, policy=POLICY)],
            evaluations=[EVALUATION], skipped_groups=1, dropped_groups=2, failed_groups=3, adapter="/a",
            created=100.5, finished=200.5, last=REPORT,
        ),
    ),
    "submission": (topology.SUBMISSIONS, Submission(job="first-1", seq=1)),
    "job_asked": (topology.JOB_RECORDS, JobRecord(job="first-1", spec=SPEC, next_group=9, asked=[(0, 2), (5, 8)])),
    "job_paused": (
        topology.JOB_RECORDS,
        JobRecord(job="first-1", spec=SPEC, phase="paused", wanted="pause", step_began=99.5, paused=100.5),
    ),
    "policy": (topology.POLICIES, RECORD),
    "delivery": (topology.DELIVERIES, DeliveryMark(delivery=3, vanished=2)),
    "lease": (topology.LEASES, Lease(holder="trainer-1")),
    "replica": (
        topology.REPLICAS,
        ReplicaRecord(
            replica="trainer-1", service="trainer", pid=9, host="127.0.0.1", metrics_port=8000, activity="idle",
            ready=True, base_model="org/model", started=1.5, offers=["reward:numeric"],
        ),
    ),
    "run_of_session": (
        topology.RUNS,
        RunRecord(
            run="s-1:train:0", base_model="org/model", lora=LORA, session="s-1", created=100.5,
            user_metadata={"note": ["good"]},
        ),
    ),
    "checkpoint": (topology.CHECKPOINTS, CHECKPOINT),
    "inflight": (topology.INFLIGHT, POLICY),
    "session": (
        topology.SESSIONS,
        SessionRecord(
            session="s-1", owner="team", created=100.5, project="math", display_name="first try", tags=["a"],
            user_metadata={"note": "good"}, sdk_version="0.38.0", ended="errored", ended_at=200.5, end_detail="why",
        ),
    ),
    "heartbeat": (topology.HEARTBEATS, Heartbeat(at=100.5)),
    "sampler": (
        topology.SAMPLERS,
        SamplerRecord(
            sampler="s-1:sample:0", session="s-1", owner="team", base_model="org/model", policy=POLICY,
            path="tinker://s-1:train:0/sampler_weights/step-10", inflight=True, created=100.5,
        ),
    ),
    "activity": (topology.ACTIVITY, RunActivity(at=100.5)),
    "tenant": (
        topology.TENANTS,
        TenantRecord(
            tenant="team", created=100.5,
            limits=TenantLimits(runs=1, requests=2, queued_tokens=3, checkpoint_bytes=4),
        ),
    ),
    "key": (
        topology.KEYS,
        KeyRecord(
            id="k-1", tenant="team", created=100.5, label="ann", project="math", admin=True, expires=300.5,
            revoked=200.5,
        ),
    ),
    "alias": (topology.ALIASES, "org/model"),
    "placement": (
        topology.PLACEMENTS,
        PlacementRecord(
            replica="samplers-0", group="samplers", role="sampler", base_model="org/model", gpus=["node/0"],
            memory_gib=8.5, milli=250, since=100.5, types=["H100"], replaces="samplers-1", draining=True, pinned=True,
        ),
    ),
    "node": (
        topology.NODES,
        NodeRecord(
            node="node", gpus=[GpuRecord(name="node/0", index="0", memory_gib=80.0, type="H100")], cordoned=True
        ),
    ),
    "plan": (
        topology.PLANS,
        PlanRecord(
            at=100.5,
            groups=[
                GroupStanding(
                    group="samplers", role="sampler", base_model="org/model", have=1, wanted=2, reason="why",
                    load={"queued": 3.0},
                )
            ],
            replicas=[
                ReplicaPlan(
                    replica="samplers-1", group="samplers", gpus=["node/0"], memory_gib=8.5, milli=250, state="start",
                    reason="why",
                )
            ],
            unmet=["why not"], gpus=[GpuRecord(name="node/0", index="0", memory_gib=80.0, type="H100")], gpus_used=1,
            frozen="no", dry_run=True,
        ),
    ),
    "secret": (topology.SECRETS, "00ff"),
}  # fmt: skip
"""By file name: the bucket, and its value."""
