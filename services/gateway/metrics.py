"""What a gateway measures."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.worker import SECONDS_BUCKETS


class GatewayMetrics:
    """The gateway's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "openrl_gateway_requests_total", "Requests by endpoint and status", ["endpoint", "status"],
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "openrl_gateway_request_seconds", "From the head of a request to its answer; polls include their wait",
            ["endpoint"], buckets=SECONDS_BUCKETS, registry=registry,
        )  # fmt: skip
        self.in_progress = Gauge(
            "openrl_gateway_requests_in_progress", "Requests being answered", ["endpoint"], registry=registry
        )
        self.try_again = Counter(
            "openrl_gateway_try_again_total", "Polls without a result, by the state of the queue", ["state"],
            registry=registry,
        )  # fmt: skip
        self.refused = Counter(
            "openrl_gateway_refused_total", "Requests turned away because a tenant is at a limit", ["tenant"],
            registry=registry,
        )  # fmt: skip
        self._waiting = Gauge("openrl_gateway_polls_waiting", "Polls that wait for a result", registry=registry)
        self._unanswered = Gauge(
            "openrl_gateway_unanswered", "Operations and samples submitted here and not answered", registry=registry
        )
        self._cached = Gauge("openrl_gateway_cached_result_bytes", "Results in memory", registry=registry)

    def watch(self, waiting: Callable[[], float], unanswered: Callable[[], float], cached: Callable[[], float]) -> None:
        """Ask these whenever somebody reads the metrics."""
        self._waiting.set_function(waiting)
        self._unanswered.set_function(unanswered)
        self._cached.set_function(cached)
