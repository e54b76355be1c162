"""What a sampler measures."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.sampler.engines.base import SamplerEngine
from shared.worker import SECONDS_BUCKETS


class SamplerMetrics:
    """The sampler's metrics."""

    def __init__(self, registry: CollectorRegistry, engine: SamplerEngine) -> None:
        """`engine` is asked for its load whenever somebody reads the metrics."""
        self.tokens = Counter("openrl_sampler_tokens_total", "Tokens computed", ["what"], registry=registry)
        self.queue_seconds = Histogram(
            "openrl_sampler_queue_seconds", "Arrival to first computation", buckets=SECONDS_BUCKETS, registry=registry
        )
        self.abandoned = Counter(
            "openrl_sampler_abandoned_total", "Requests given up by whoever asked", registry=registry
        )
        self.policy_seconds = Histogram(
            "openrl_sampler_policy_load_seconds", "Fetching and loading a policy", buckets=SECONDS_BUCKETS,
            registry=registry,
        )  # fmt: skip
        running = Gauge("openrl_sampler_sequences_running", "Sequences being generated", registry=registry)
        running.set_function(lambda: engine.load().running)
        waiting = Gauge("openrl_sampler_sequences_waiting", "Sequences waiting for a place", registry=registry)
        waiting.set_function(lambda: engine.load().waiting)
        policies = Gauge("openrl_sampler_policies_loaded", "Policies in memory", registry=registry)
        policies.set_function(lambda: len(engine.policies))
