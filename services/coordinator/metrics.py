"""What a coordinator measures: the jobs that it drives, and the bus, which it sees also when nobody else is there."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from services.coordinator.mismatch import MISMATCH
from shared.bus_load import BusLoad, QueueLoad, StreamLoad
from shared.contracts.jobs import FINISHED, Evaluation, StepReport

ENDED_JOBS = 32
"""Jobs whose series stay after they have ended, so that the last step is still scraped. Older ones are dropped."""
STALE_SECONDS = 15.0
"""A look at the bus that is older is not shown any more: better no figure than one that may be wrong."""
MOST_QUEUES = 256
"""Queues that are shown, those with most messages first: their names come from whoever publishes."""


class CoordinatorMetrics:
    """The coordinator's metrics. The series of a job bear its id as `job_id`, since `job` is Prometheus's own label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.submitted = Counter(
            "openrl_jobs_submitted_total", "Submissions by outcome", ["outcome"], registry=registry
        )
        self.finished = Counter("openrl_jobs_finished_total", "Jobs by how they ended", ["phase"], registry=registry)
        self.removed = Counter(
            "openrl_removed_total", "What the janitor has put away, by kind", ["what"], registry=registry
        )
        self.running = Gauge("openrl_jobs_running", "Jobs driven here", registry=registry)
        self.open = Gauge("openrl_jobs_open", "Jobs of the mesh that have not ended", ["phase"], registry=registry)
        self.disk_free = Gauge("openrl_disk_free_bytes", "Room in a file system (blobs)", ["place"], registry=registry)
        self.disk_size = Gauge("openrl_disk_size_bytes", "Size of a file system", ["place"], registry=registry)
        self.step = Gauge("openrl_job_step", "Steps done", ["job_id"], registry=registry)
        self.reward = Gauge("openrl_job_reward", "Mean reward of the newest step", ["job_id"], registry=registry)
        self.accuracy = Gauge("openrl_job_held_out_accuracy", "Newest evaluation", ["job_id"], registry=registry)
        self.staleness = Gauge(
            "openrl_job_staleness_steps", "Mean staleness of the newest step", ["job_id"], registry=registry
        )
        self.mismatch = Gauge(
            "openrl_job_logprob_mismatch", "Mean |log p of the trainer - of the sampler|, same tokens, same weights",
            ["job_id"], registry=registry,
        )  # fmt: skip
        self.tokens = Counter("openrl_job_sampled_tokens_total", "Tokens in used groups", ["job_id"], registry=registry)
        self.groups = Counter("openrl_job_groups_total", "Groups by outcome", ["job_id", "outcome"], registry=registry)
        self.phase_seconds = Counter(
            "openrl_job_phase_seconds_total", "Time of the steps by what the job waited for (groups, training)",
            ["job_id", "phase"], registry=registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            "openrl_job_step_seconds", "Time from step to step", ["job_id"], buckets=(0.1, 1, 3, 10, 30, 100, 300),
            registry=registry,
        )  # fmt: skip
        self.bus = BusMetrics(registry)
        self._of_jobs = (
            self.step, self.reward, self.accuracy, self.staleness, self.mismatch, self.tokens, self.groups,
            self.phase_seconds, self.step_seconds,
        )  # fmt: skip
        self._ended: deque[str] = deque()
        for phase in FINISHED:
            self.finished.labels(phase)  # from 0 on: an alert looks at the increase

    def stepped(self, job: str, row: StepReport) -> None:
        """Count a step."""
        self.step.labels(job).set(row.step)
        self.reward.labels(job).set(row.reward)
        self.staleness.labels(job).set(row.staleness)
        if MISMATCH in row.metrics:
            self.mismatch.labels(job).set(row.metrics[MISMATCH])
        self.tokens.labels(job).inc(row.tokens)
        self.step_seconds.labels(job).observe(row.seconds)
        training = min(row.seconds, row.train_seconds)
        self.phase_seconds.labels(job, "training").inc(training)
        self.phase_seconds.labels(job, "groups").inc(row.seconds - training)
        self.groups.labels(job, "trained").inc(row.trained_groups)
        self.groups.labels(job, "skipped").inc(row.skipped_groups)
        self.groups.labels(job, "dropped").inc(row.dropped_groups)

    def ended(self, job: str, phase: str) -> None:
        """Count an end. The job's series stay for now."""
        self.finished.labels(phase).inc()
        self._ended.append(job)
        while len(self._ended) > ENDED_JOBS:
            self._forget(self._ended.popleft())

    def left(self, job: str) -> None:
        """The job is not driven here any more: if it has not ended, somebody else counts it from now on."""
        if job not in self._ended:
            self._forget(job)

    def _forget(self, job: str) -> None:
        for metric in self._of_jobs:
            metric.remove_by_labels({"job_id": job})

    def evaluated(self, job: str, evaluation: Evaluation) -> None:
        """Count an evaluation. One that measured nothing leaves no figure, not even that of an earlier one."""
        if evaluation.accuracy is not None:
            self.accuracy.labels(job).set(evaluation.accuracy)
            return
        with contextlib.suppress(KeyError):
            self.accuracy.remove(job)


@dataclass(frozen=True)
class _Look:
    load: BusLoad
    at: float


class BusMetrics:
    """Shows the last look at the bus, as long as it is fresh. Several coordinators show the same: take the maximum."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._look: _Look | None = None
        registry.register(self)

    def seen(self, load: BusLoad) -> None:
        """Take in a look."""
        self._look = _Look(load, self._clock())

    def describe(self) -> Iterable[Metric]:
        """See prometheus_client."""
        return self._families(BusLoad([], [], 0, 0), 0.0)

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        look = self._look
        if look is None or (age := self._clock() - look.at) > STALE_SECONDS:
            return []
        return self._families(look.load, age)

    def _families(self, load: BusLoad, age: float) -> Iterator[Metric]:
        yield GaugeMetricFamily("openrl_bus_look_age_seconds", "Age of what is said here of the bus", value=age)
        yield from _storage(load)
        yield from _streams(load.streams)
        yield from _queues(sorted(load.queues, key=lambda queue: -queue.waiting - queue.in_work)[:MOST_QUEUES])


def _storage(load: BusLoad) -> Iterator[Metric]:
    yield GaugeMetricFamily("openrl_bus_storage_bytes", "Disk in use by all streams", value=load.storage)
    yield GaugeMetricFamily(
        "openrl_bus_storage_limit_bytes",
        "Disk that they may use, or their own limits together",
        value=load.storage_limit,
    )


def _streams(streams: Iterable[StreamLoad]) -> Iterator[Metric]:
    messages = GaugeMetricFamily("openrl_bus_stream_messages", "Messages in a stream", labels=["stream"])
    size = GaugeMetricFamily("openrl_bus_stream_bytes", "Bytes in a stream", labels=["stream"])
    limit = GaugeMetricFamily(
        "openrl_bus_stream_limit_bytes", "Bytes at which a stream is full; 0: no limit of its own", labels=["stream"]
    )
    published = CounterMetricFamily("openrl_bus_stream_published", "Messages ever put in", labels=["stream"])
    for stream in streams:
        messages.add_metric([stream.name], stream.messages)
        size.add_metric([stream.name], stream.bytes)
        limit.add_metric([stream.name], stream.limit)
        published.add_metric([stream.name], stream.published)
    return iter((messages, size, limit, published))


def _queues(queues: Iterable[QueueLoad]) -> Iterator[Metric]:
    labels = ["channel", "queue"]
    waiting = GaugeMetricFamily("openrl_queue_waiting", "Messages that nobody has taken", labels=labels)
    in_work = GaugeMetricFamily("openrl_queue_in_work", "Messages given out, not acknowledged", labels=labels)
    oldest = GaugeMetricFamily("openrl_queue_oldest_seconds", "How long the oldest message waits", labels=labels)
    for queue in queues:
        of = [queue.channel, queue.name]
        waiting.add_metric(of, queue.waiting)
        in_work.add_metric(of, queue.in_work)
        oldest.add_metric(of, queue.oldest)
    return iter((waiting, in_work, oldest))
