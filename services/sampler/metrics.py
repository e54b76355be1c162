"""What a sampler measures. All of it bears the label `base_model` (see `shared.metrics`)."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.sampler.engines.base import SamplerEngine
from shared.metrics import MOST_TENANTS, Busy, Few
from shared.worker import SECONDS_BUCKETS


class SamplerMetrics:
    """The sampler's metrics."""

    def __init__(self, registry: CollectorRegistry, engine: SamplerEngine, slots: int = 0) -> None:
        """`engine` is asked for its load when somebody reads the metrics. `slots`: sequences it generates at once."""
        self.tokens = Counter("openrl_sampler_tokens_total", "Tokens computed", ["what"], registry=registry)
        self.tenant_tokens = Counter(
            "openrl_sampler_tenant_tokens_total", "The same by who asked", ["tenant", "what"], registry=registry
        )
        self._tenants = Few(MOST_TENANTS)
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
        self.sequences = Counter("openrl_sampler_sequences_total", "Sequences finished", registry=registry)
        self.busy = Busy("openrl_sampler_busy_seconds", "Time in which the engine had requests", registry)
        self._numbers = itertools.count()
        self._since: dict[int, float] = {}
        """When the requests came that are not answered yet, oldest first."""
        running = Gauge("openrl_sampler_sequences_running", "Sequences being generated", registry=registry)
        running.set_function(lambda: engine.load().running)
        waiting = Gauge("openrl_sampler_sequences_waiting", "Sequences waiting for a place", registry=registry)
        waiting.set_function(lambda: engine.load().waiting)
        policies = Gauge("openrl_sampler_policies_loaded", "Policies in memory", registry=registry)
        policies.set_function(lambda: len(engine.policies))
        kv_cache = Gauge("openrl_sampler_kv_cache_ratio", "Share of the key-value cache in use", registry=registry)
        kv_cache.set_function(lambda: engine.load().kv_cache)
        oldest = Gauge(
            "openrl_sampler_oldest_request_seconds", "Time that the oldest unanswered request is here",
            registry=registry,
        )  # fmt: skip
        oldest.set_function(self._oldest)
        policy_slots = Gauge("openrl_sampler_policy_slots", "Policies that fit into memory", registry=registry)
        policy_slots.set_function(lambda: engine.capacity)
        Gauge("openrl_sampler_sequence_slots", "Sequences generated at the same time at most", registry=registry).set(
            slots
        )

    def answered(self, tenant: str, *, prompt: int, sampled: Sequence[int]) -> None:
        """Count an answer: tokens of its prompt and of each of its sequences."""
        self.sequences.inc(len(sampled))
        for what, tokens in (("prompt", prompt), ("sampled", sum(sampled))):
            self.tokens.labels(what).inc(tokens)
            self.tenant_tokens.labels(self._tenants(tenant), what).inc(tokens)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, from its arrival at this replica to its answer."""
        number = next(self._numbers)
        self._since[number] = time.monotonic()
        try:
            yield
        finally:
            del self._since[number]

    def _oldest(self) -> float:
        since = next(iter(self._since.values()), None)
        return 0.0 if since is None else time.monotonic() - since
