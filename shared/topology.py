"""Every subject, stream, consumer and bucket of the mesh; no other file spells one.

A channel joins a subject to one message type. Names that come from outside (models, runs, jobs) become single subject
tokens by `token`, so no name can widen a subject.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Generic, TypeVar

from shared.contracts.checkpoints import CheckpointRecord
from shared.contracts.checks import CheckEnvironment, CheckReward
from shared.contracts.episodes import GroupScored, PlayGroup, ScoreGroup
from shared.contracts.jobs import ControlJob, JobChanged, JobProgressed, JobRecord, JobStanding, Submission, SubmitJob
from shared.contracts.placement import NodeRecord, PlacementRecord, PlanRecord, ScalingDecided
from shared.contracts.policies import PolicyPublished, PolicyRecord, PolicyRef
from shared.contracts.replicas import ReplicaRecord
from shared.contracts.results import DeadLetter, DeliveryMark, Result, ResultTiming
from shared.contracts.sampling import SampleRequest
from shared.contracts.sessions import Heartbeat, RunActivity, SamplerRecord, SessionRecord
from shared.contracts.tenants import Audited, KeyRecord, TenantRecord, UsageRecorded
from shared.contracts.training import AnyOperation, Lease, RunRecord
from shared.errors import TemporaryError, UserError

T = TypeVar("T")

HOUR = 3600.0
DAY = 24 * HOUR
MIB = 1 << 20
MAX_NAME = 200
MAX_CONSUMER_NAME = 255
"""What nats-server takes."""
LINE = "=="
"""In the name of a line's consumer, before the owner: no token holds it, so the name is no other consumer's."""
BODIES = "messages/"
"""Where the blob store keeps bodies that are too large for a message."""
BODIES_AGE = 7 * DAY
"""As long as the longest stream that is read from its beginning."""
_SPECIAL = re.compile(r"[^A-Za-z0-9_-]+")


class Kept(Enum):
    """How long a stream keeps a message."""

    UNTIL_DONE = "workqueue"
    """Until one consumer has acknowledged it."""
    BY_LIMITS = "limits"
    """Until it is too old, or purged."""


@dataclass(frozen=True)
class Stream:
    """A JetStream stream. When `max_bytes` are used up, publishers are refused, unless it `drops_oldest`."""

    name: str
    subjects: tuple[str, ...]
    kept: Kept
    max_age: float = 0.0
    """Seconds; 0: for ever."""
    max_bytes: int = 256 * MIB
    duplicate_window: float = 10 * 60.0
    """Seconds in which a repeated message id is recognised."""
    drops_oldest: bool = False
    """When full, lose the oldest message rather than refuse the newest. Only where nobody depends on the oldest."""
    notices: tuple[str, str] | None = None
    """For each message on the first subject, once it is stored, its headers go out on the second, on no stream."""


JOBS = Stream("JOBS", ("rl.v1.jobs.*",), Kept.BY_LIMITS, max_age=7 * DAY, max_bytes=64 * MIB)
CHECKS = Stream("CHECKS", ("rl.v1.checks.*",), Kept.UNTIL_DONE, max_age=60.0, max_bytes=16 * MIB, duplicate_window=60.0)
TRAIN = Stream("TRAIN", ("rl.v1.train.*",), Kept.BY_LIMITS, max_bytes=4096 * MIB)
SAMPLE = Stream(
    "SAMPLE",
    ("rl.v1.sample.*", "rl.v1.sample.*.*"),
    Kept.UNTIL_DONE,
    notices=("rl.v1.sample.>", "rl.v1.waiting.>"),
)
EPISODES = Stream("EPISODES", ("rl.v1.episodes.*",), Kept.UNTIL_DONE)
SCORES = Stream("SCORES", ("rl.v1.scores.*",), Kept.UNTIL_DONE)
ROLLOUTS = Stream(
    "ROLLOUTS", ("rl.v1.rollouts.*",), Kept.BY_LIMITS, max_age=7 * DAY, max_bytes=1024 * MIB, drops_oldest=True
)
RESULTS = Stream("RESULTS", ("rl.v1.results.>",), Kept.BY_LIMITS, max_age=HOUR, max_bytes=1024 * MIB, drops_oldest=True)
EVENTS = Stream("EVENTS", ("rl.v1.events.>",), Kept.BY_LIMITS, max_age=7 * DAY, drops_oldest=True)
DEAD = Stream("DEAD", ("rl.v1.dead.>",), Kept.BY_LIMITS, max_age=30 * DAY, drops_oldest=True)
USAGE = Stream("USAGE", ("rl.v1.usage.*",), Kept.BY_LIMITS, max_age=400 * DAY, drops_oldest=True)
AUDIT = Stream("AUDIT", ("rl.v1.audit.*",), Kept.BY_LIMITS, max_age=400 * DAY, drops_oldest=True)
STREAMS = (JOBS, CHECKS, TRAIN, SAMPLE, EPISODES, SCORES, ROLLOUTS, RESULTS, EVENTS, DEAD, USAGE, AUDIT)
MOST_BYTES = sum(stream.max_bytes for stream in STREAMS)
"""What a nats-server must be allowed to store."""


@dataclass(frozen=True)
class Channel(Generic[T]):
    """A subject and the one type that travels on it."""

    name: str
    template: str
    """The subject; each `{part}` is filled with one token (a request id may be several, as `asker.id`)."""
    type: Any
    stream: Stream
    json: bool = False
    """Write JSON rather than MessagePack. Both are always read."""
    by: str = ""
    """A field of the message that we put behind the subject, as one more token, so that each of its values has a line
    of its own. Messages of others that lack this token are taken too."""

    def subject(self, **parts: str) -> str:
        """The subject for these parts."""
        return self.template.format(**{name: _tokens(name, value) for name, value in parts.items()})

    def subject_of(self, message: T, **parts: str) -> str:
        """The subject on which we publish this message."""
        subject = self.subject(**parts)
        return f"{subject}.{token(getattr(message, self.by))}" if self.by else subject

    @property
    def pattern(self) -> str:
        """The subject with every part open."""
        return re.sub(r"\{\w+\}", "*", self.template)

    @property
    def below(self) -> str:
        """The pattern of all subjects that begin as this channel's do, whatever follows their first part."""
        return f"{self._fixed}>"

    def part(self, subject: str) -> str:
        """What fills the first part of a subject."""
        return untoken(subject.removeprefix(self._fixed).partition(".")[0])

    @property
    def _fixed(self) -> str:
        return self.template.partition("{")[0]


def token(text: str) -> str:
    """Make any text one subject token, file name and KV key: what is special becomes `=` and its hexadecimal code.

    Different texts give different tokens. Raise `UserError` for an empty text and one of over 200 characters.
    """
    if not 0 < len(text) <= MAX_NAME:
        raise UserError(f"a name of {len(text)} characters cannot be used: give one of 1 to {MAX_NAME}")
    return _SPECIAL.sub(lambda found: "".join(f"={byte:02X}" for byte in found.group().encode()), text)


def is_request(text: str) -> bool:
    """Whether an answer to this request id can be published at all."""
    return all(0 < len(part) <= MAX_NAME for part in text.split("."))


def is_plain_request(text: str) -> bool:
    """Whether a request id stands in the subject of its answer as it is, so that anybody can subscribe to it."""
    return len(text) <= MAX_NAME and re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", text) is not None


def untoken(text: str) -> str:
    """The text that `token` was given."""
    encoded = re.sub(r"=([0-9A-F]{2})", lambda found: chr(int(found.group(1), 16)), text)
    return encoded.encode("latin-1").decode()


def _tokens(name: str, value: str) -> str:
    if name == "request":
        return ".".join(token(part) for part in value.split("."))
    return token(value)


SUBMIT = Channel[SubmitJob]("submit", "rl.v1.jobs.submit", SubmitJob, JOBS, json=True)
CANCEL = Channel[ControlJob]("cancel", "rl.v1.jobs.cancel", ControlJob, JOBS, json=True)
PAUSE = Channel[ControlJob]("pause", "rl.v1.jobs.pause", ControlJob, JOBS, json=True)
RESUME = Channel[ControlJob]("resume", "rl.v1.jobs.resume", ControlJob, JOBS, json=True)
DELETE = Channel[ControlJob]("delete", "rl.v1.jobs.delete", ControlJob, JOBS, json=True)
ENVIRONMENT_CHECKS = Channel[CheckEnvironment](
    "environment_checks", "rl.v1.checks.environment", CheckEnvironment, CHECKS
)
REWARD_CHECKS = Channel[CheckReward]("reward_checks", "rl.v1.checks.reward", CheckReward, CHECKS)
OPERATIONS = Channel[AnyOperation]("operations", "rl.v1.train.{run}", AnyOperation, TRAIN)
SAMPLES = Channel[SampleRequest]("samples", "rl.v1.sample.{pool}", SampleRequest, SAMPLE, by="owner")
GROUPS = Channel[PlayGroup]("groups", "rl.v1.episodes.{environment}", PlayGroup, EPISODES)
PLAYED = Channel[ScoreGroup]("played", "rl.v1.scores.{reward}", ScoreGroup, SCORES)
SCORED = Channel[GroupScored]("scored", "rl.v1.rollouts.{job}", GroupScored, ROLLOUTS)
ANSWERS = Channel[Result]("answers", "rl.v1.results.{request}", Result, RESULTS)
TIMINGS = Channel[ResultTiming]("timings", "rl.v1.results.{session}.>", ResultTiming, RESULTS)
"""The answers to all requests of a session, read for their times."""
POLICIES_PUBLISHED = Channel[PolicyPublished](
    "policies", "rl.v1.events.policy.{run}", PolicyPublished, EVENTS, json=True
)
JOB_PROGRESS = Channel[JobProgressed]("progress", "rl.v1.events.progress.{job}", JobProgressed, EVENTS, json=True)
JOB_PHASES = Channel[JobChanged]("phases", "rl.v1.events.job.{job}", JobChanged, EVENTS, json=True)
SCALING = Channel[ScalingDecided]("scaling", "rl.v1.events.scaling.{group}", ScalingDecided, EVENTS, json=True)
DEAD_LETTERS = Channel[DeadLetter]("dead_letters", "rl.v1.dead.{stream}", DeadLetter, DEAD)
USED = Channel[UsageRecorded]("usage", "rl.v1.usage.{owner}", UsageRecorded, USAGE, json=True)
AUDITS = Channel[Audited]("audit", "rl.v1.audit.{owner}", Audited, AUDIT, json=True)
CHANNELS: tuple[Channel[Any], ...] = (
    SUBMIT, CANCEL, PAUSE, RESUME, DELETE, ENVIRONMENT_CHECKS, REWARD_CHECKS, OPERATIONS, SAMPLES, GROUPS, PLAYED,
    SCORED, ANSWERS, POLICIES_PUBLISHED, JOB_PROGRESS, JOB_PHASES, SCALING, DEAD_LETTERS, USED, AUDITS,
)  # fmt: skip


def answers_of(asker: str) -> str:
    """The subject of all answers to requests `asker.…`."""
    return f"{ANSWERS.subject(request=asker)}.>"


ABANDONED = "rl.v1.abandoned"
"""Below it, a request that its asker has given up. On no stream: who does not hear of it works in vain, no more."""


def abandoned(request: str) -> str:
    """The subject that says that nobody waits for a request any more."""
    return f"{ABANDONED}.{_tokens('request', request)}"


def abandoned_request(subject: str) -> str:
    """The request that `abandoned` was given."""
    return ".".join(untoken(part) for part in subject.removeprefix(f"{ABANDONED}.").split("."))


@dataclass(frozen=True)
class Consumer(Generic[T]):
    """A durable consumer that the replicas of a service share."""

    name: str
    channel: Channel[T]
    subject: str
    """What it is given: the channel's pattern, or one of its subjects."""
    ack_wait: float = 30.0
    """Seconds without a sign of life after which a message goes to somebody else."""
    max_deliver: int = 5
    """How often a message whose handler fails by a defect is given out."""
    temporary_deliveries: int = 25
    """How often one whose handler raises `TemporaryError` is, with growing delays: some ten minutes in all."""
    chances: int = 0
    """How often one may be given out to somebody who then ends without a word (see `shared.chances`). 0: as often as
    `temporary_deliveries` allows."""
    max_pending: int = 256
    """Messages that may be out at the same time, over all replicas: the back-pressure of a work queue. With `lines`,
    of each line."""
    lines: str = ""
    """A pattern that ends in `*`: each of its subjects is a line, with a durable consumer of its own, and lines are
    served in turn. The consumer's own `subject` is one more line. Empty: only that one."""
    notices: str = ""
    """With `lines`, where the stream tells of their messages: this stands there in place of `subject`."""

    def line(self, subject: str) -> Consumer[T]:
        """The consumer of one line."""
        if subject == self.subject:
            return self
        name = f"{self.name}{LINE}{subject.rpartition('.')[2]}"
        if len(name) > MAX_CONSUMER_NAME:
            name = f"{name[: MAX_CONSUMER_NAME - 34]}{LINE}{hashlib.sha256(name.encode()).hexdigest()[:32]}"
        return replace(self, name=name, subject=subject, lines="", notices="")

    def noticed(self, subject: str) -> str:
        """The line that a notice is about."""
        return self.subject + subject.removeprefix(self.notices)

    def is_last(self, error: BaseException, deliveries: int) -> bool:
        """Whether a message that failed with `error` will not be given out again.

        A cancellation, when a replica stops, counts as temporary.
        """
        temporary = isinstance(error, TemporaryError) or not isinstance(error, Exception)
        return deliveries >= (self.temporary_deliveries if temporary else self.max_deliver)


def job_consumer(channel: Channel[T]) -> Consumer[T]:
    """The coordinator's consumer of one kind of job command."""
    return Consumer(f"coordinator-{channel.name}", channel, channel.pattern, chances=CHANCES)


CHANCES = 3
GROUP_PLAYERS = Consumer(name="environment", channel=GROUPS, subject=GROUPS.pattern, max_pending=512, chances=CHANCES)
GROUP_SCORERS = Consumer(name="reward", channel=PLAYED, subject=PLAYED.pattern, chances=CHANCES)
ENVIRONMENT_CHECKERS = Consumer("environment-checks", ENVIRONMENT_CHECKS, ENVIRONMENT_CHECKS.pattern, chances=CHANCES)
REWARD_CHECKERS = Consumer("reward-checks", REWARD_CHECKS, REWARD_CHECKS.pattern, chances=CHANCES)


def sampler_consumer(base_model: str) -> Consumer[SampleRequest]:
    """What all samplers of a base model share: a line for each owner, and one for requests that name none."""
    pool = SAMPLES.subject(pool=base_model)
    return Consumer(
        f"sampler-{token(base_model)}",
        SAMPLES,
        pool,
        ack_wait=10.0,  # as leases: whoever waits for a sample should not wait long for a replica that is dead
        max_pending=4096,
        lines=f"{pool}.*",
        notices=f"rl.v1.waiting.{token(base_model)}",
    )


def sample_owner(subject: str) -> str | None:
    """The owner that the subject of a sample request names; None: it names none."""
    _, _, rest = subject.removeprefix("rl.v1.sample.").partition(".")
    return untoken(rest) if rest else None


@dataclass(frozen=True)
class Bucket(Generic[T]):
    """A key-value bucket whose values have one type. Values are JSON, for people with a `nats` command."""

    name: str
    type: type[T]
    ttl: float = 0.0
    """Seconds after which an entry that is not renewed goes away; 0: never."""


RUNS = Bucket("runs", RunRecord)
JOB_RECORDS = Bucket("jobs", JobRecord)
JOB_STANDINGS = Bucket("jobs", JobStanding)
"""The same bucket, read for one field."""
POLICIES = Bucket("policies", PolicyRecord)
SUBMISSIONS = Bucket("submissions", Submission, ttl=JOBS.max_age)
LEASES = Bucket("leases", Lease, ttl=10.0)
REPLICAS = Bucket("replicas", ReplicaRecord, ttl=10.0)
DELIVERIES = Bucket("deliveries", DeliveryMark, ttl=HOUR)
CHECKPOINTS = Bucket("checkpoints", CheckpointRecord)
INFLIGHT = Bucket("inflight", PolicyRef)
"""By run: the policy that samples in flight. Its version only grows."""
SESSIONS = Bucket("sessions", SessionRecord)
HEARTBEATS = Bucket("heartbeats", Heartbeat, ttl=15 * 60.0)
SAMPLERS = Bucket("samplers", SamplerRecord)
ACTIVITY = Bucket("activity", RunActivity)
TENANTS = Bucket("tenants", TenantRecord)
KEYS = Bucket("keys", KeyRecord)
"""By SHA-256 of the key, in hexadecimal."""
PLACEMENTS = Bucket("placements", PlacementRecord)
"""By replica: what the autoscaler wants to run on machines that have a supervisor."""
NODES = Bucket("nodes", NodeRecord, ttl=10.0)
PLANS = Bucket("plans", PlanRecord)
ALIASES = Bucket("aliases", str)
"""Other names of models: alias to the name under which the model is served."""
SECRETS = Bucket("secrets", str)
"""What the replicas of a service sign with, by service."""
BUCKETS: tuple[Bucket[Any], ...] = (
    RUNS, JOB_RECORDS, SUBMISSIONS, POLICIES, LEASES, REPLICAS, DELIVERIES, CHECKPOINTS, INFLIGHT, SESSIONS,
    HEARTBEATS, SAMPLERS, ACTIVITY, TENANTS, KEYS, PLACEMENTS, NODES, PLANS, ALIASES, SECRETS,
)  # fmt: skip
