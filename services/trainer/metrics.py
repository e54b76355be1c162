"""What a trainer measures. All of it bears the label `base_model` (see `shared.metrics`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.trainer.held import HeldRun
from services.trainer.residency import Level
from shared.metrics import MOST_TENANTS, Busy, Few
from shared.worker import SECONDS_BUCKETS


class TrainerMetrics:
    """The trainer's metrics."""

    def __init__(self, registry: CollectorRegistry, held: Callable[[], Collection[HeldRun]]) -> None:
        """`held`, the runs now held, is asked whenever somebody reads the metrics."""
        self._registry = registry
        self._held = held
        self.operations = Counter(
            "openrl_trainer_operations_total", "Operations by kind and outcome", ["op", "outcome"], registry=registry
        )
        self.tokens = Counter(
            "openrl_trainer_tokens_total", "Tokens that went through passes", ["tenant"], registry=registry
        )
        self.passes = Counter("openrl_trainer_passes_total", "Forward and backward passes", registry=registry)
        self.busy = Busy("openrl_trainer_busy_seconds", "Time in the engine", registry)
        self.pass_seconds = Histogram(
            "openrl_trainer_pass_seconds", "Forward and backward passes", buckets=SECONDS_BUCKETS, registry=registry
        )
        self.pass_runs = Histogram(
            "openrl_trainer_pass_runs", "Runs in a pass", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=registry
        )
        self.pass_tokens = Histogram(
            "openrl_trainer_pass_tokens", "Tokens in a pass",
            buckets=(64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536), registry=registry,
        )  # fmt: skip
        self.load_seconds = Histogram(
            "openrl_trainer_load_seconds", "Bringing a run back to the device", ["source"], buckets=SECONDS_BUCKETS,
            registry=registry,
        )  # fmt: skip
        self.run_slots = Gauge("openrl_trainer_run_slots", "Runs that can be held", registry=registry)
        self.resident_slots = Gauge(
            "openrl_trainer_resident_slots", "Runs that may be on the device", registry=registry
        )
        self._tenants = Few(MOST_TENANTS)
        self.snapshots = Counter(
            "openrl_trainer_snapshots_total", "Snapshots by outcome", ["outcome"], registry=registry
        )
        self.loads = Counter(
            "openrl_trainer_loads_total", "Runs brought back to the device", ["source"], registry=registry
        )
        self.leases_lost = Counter(
            "openrl_trainer_leases_lost_total", "Runs that somebody else took", registry=registry
        )
        self._gauge("openrl_trainer_runs", "Runs held", lambda _: 1)
        self._gauge("openrl_trainer_resident_runs", "On the device", lambda run: run.level is Level.DEVICE)
        self._gauge("openrl_trainer_parked_runs", "In host memory", lambda run: run.level is Level.HOST)
        self._gauge("openrl_trainer_evicted_runs", "Only in the blob store", lambda run: run.level is Level.STORE)
        self._gauge("openrl_trainer_backlog", "Operations read and not executed", lambda run: len(run.backlog.waiting))
        self._gauge("openrl_trainer_backlog_tokens", "Tokens of these operations", lambda run: run.tokens_waiting)
        oldest = Gauge("openrl_trainer_oldest_operation_seconds", "How long the oldest waits here", registry=registry)
        oldest.set_function(self._oldest)

    def _gauge(self, name: str, what: str, of: Callable[[HeldRun], int]) -> None:
        """Declare the sum of something over the runs held."""
        gauge = Gauge(name, what, registry=self._registry)
        gauge.set_function(lambda: sum(of(run) for run in self._held()))

    def took(self, tenant: str, tokens: int) -> None:
        """Count a tenant's tokens in a pass."""
        self.tokens.labels(self._tenants(tenant)).inc(tokens)

    def _oldest(self) -> float:
        """Seconds that the operation read first, of all that are not executed, has been here."""
        since = [min(run.arrived.values()) for run in self._held() if run.arrived]
        return time.monotonic() - min(since) if since else 0.0
