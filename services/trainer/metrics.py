"""What a trainer measures."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.worker import SECONDS_BUCKETS


class TrainerMetrics:
    """The trainer's metrics."""

    def __init__(self, registry: CollectorRegistry, runs: Callable[[], int], backlog: Callable[[], int]) -> None:
        """`runs` and `backlog` are asked whenever somebody reads the metrics."""
        self.operations = Counter(
            "openrl_trainer_operations_total", "Operations by kind and outcome", ["op", "outcome"], registry=registry
        )
        self.tokens = Counter("openrl_trainer_tokens_total", "Tokens trained", registry=registry)
        self.busy_seconds = Counter("openrl_trainer_busy_seconds_total", "Time in the engine", registry=registry)
        self.pass_seconds = Histogram(
            "openrl_trainer_pass_seconds", "Forward and backward passes", buckets=SECONDS_BUCKETS, registry=registry
        )
        self.pass_runs = Histogram(
            "openrl_trainer_pass_runs", "Runs in a pass", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.snapshots = Counter(
            "openrl_trainer_snapshots_total", "Snapshots by outcome", ["outcome"], registry=registry
        )
        self.leases_lost = Counter(
            "openrl_trainer_leases_lost_total", "Runs that somebody else took", registry=registry
        )
        Gauge("openrl_trainer_runs", "Runs held", registry=registry).set_function(runs)
        Gauge("openrl_trainer_backlog", "Operations read and not executed", registry=registry).set_function(backlog)
