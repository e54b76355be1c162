"""Metrics that several services build on, and what the coordinator shows of jobs and of the bus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from services.coordinator.metrics import ENDED_JOBS, MOST_QUEUES, STALE_SECONDS, BusMetrics, CoordinatorMetrics
from shared.bus_load import BusLoad, QueueLoad, StreamLoad
from shared.contracts.jobs import StepReport
from shared.metrics import OTHERS, Busy, Few, Registry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_all_metrics_of_a_process_bear_its_labels() -> None:
    registry = Registry()
    Gauge("plain", "p", registry=registry).set(1)
    Gauge("own", "o", ["base_model"], registry=registry).labels("mine").set(2)
    registry.labels["base_model"] = "tiny"
    text = generate_latest(registry).decode()
    assert 'plain{base_model="tiny"} 1.0' in text
    assert 'own{base_model="mine"} 2.0' in text, "a metric's own label goes before"
    assert registry.get_sample_value("plain") == 1


def test_values_of_a_label_are_bounded() -> None:
    few = Few(2)
    assert [few(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", OTHERS, "a", OTHERS]


def test_busy_time_counts_what_overlaps_once_and_what_still_runs() -> None:
    clock, registry = Clock(), CollectorRegistry()
    busy = Busy("engine_busy_seconds", "b", registry, clock)
    with busy:
        clock.now += 2
        with busy:
            clock.now += 3
        assert registry.get_sample_value("engine_busy_seconds_total") == 5
        clock.now += 1
    clock.now += 50
    assert registry.get_sample_value("engine_busy_seconds_total") == 6


def report(step: int) -> StepReport:
    return StepReport(step=step, reward=0.5, tokens=10, seconds=4.0, train_seconds=1.0)


def test_the_time_of_a_step_is_split_by_what_it_waited_for() -> None:
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    metrics.stepped("j", report(1))
    name = "openrl_job_phase_seconds_total"
    assert registry.get_sample_value(name, {"job_id": "j", "phase": "training"}) == 1
    assert registry.get_sample_value(name, {"job_id": "j", "phase": "groups"}) == 3


def jobs_of(registry: CollectorRegistry) -> set[str]:
    return {s.labels["job_id"] for f in registry.collect() for s in f.samples if "job_id" in s.labels}


def test_series_of_ended_jobs_stay_for_a_while_and_then_go() -> None:
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    names = [f"job-{number}" for number in range(ENDED_JOBS + 3)]
    for name in names:
        metrics.stepped(name, report(1))
        metrics.ended(name, "succeeded")
        metrics.left(name)
    assert jobs_of(registry) == set(names[3:])


def test_a_job_that_somebody_else_drives_has_no_series_here() -> None:
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    metrics.stepped("j", report(1))
    metrics.left("j")
    assert jobs_of(registry) == set()


def test_a_failed_job_is_an_increase_from_zero() -> None:
    registry = CollectorRegistry()
    CoordinatorMetrics(registry)
    assert registry.get_sample_value("openrl_jobs_finished_total", {"phase": "failed"}) == 0


def load(queues: int = 1) -> BusLoad:
    return BusLoad(
        streams=[StreamLoad("DEAD", messages=2, bytes=30, limit=100, published=7)],
        queues=[QueueLoad("samples", f"model-{n}", waiting=n, in_work=1, oldest=2.5) for n in range(queues)],
        storage=30,
        storage_limit=1000,
    )


def test_what_was_seen_of_the_bus_is_shown_until_it_is_old() -> None:
    registry, clock = CollectorRegistry(), Clock()
    bus = BusMetrics(registry, clock)
    assert generate_latest(registry) == b""
    bus.seen(load())
    clock.now += STALE_SECONDS
    of = {"channel": "samples", "queue": "model-0"}
    assert registry.get_sample_value("openrl_queue_oldest_seconds", of) == 2.5
    assert registry.get_sample_value("openrl_bus_stream_published_total", {"stream": "DEAD"}) == 7
    assert registry.get_sample_value("openrl_bus_look_age_seconds") == STALE_SECONDS
    clock.now += 0.1
    assert generate_latest(registry) == b"", "no figure rather than one that may be wrong"


def test_queues_are_bounded_and_the_longest_are_shown() -> None:
    registry = CollectorRegistry()
    bus = BusMetrics(registry, Clock())
    bus.seen(load(MOST_QUEUES + 5))
    shown = [s for f in registry.collect() for s in f.samples if s.name == "openrl_queue_waiting"]
    assert len(shown) == MOST_QUEUES
    assert min(sample.value for sample in shown) == 5
