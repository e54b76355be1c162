"""What metrics of several services have in common: labels of a whole process, busy time, bounded labels.

A process puts on all its metrics what only it knows (the base model that it serves). Where it runs and how it is called
is said by whoever finds it, as Prometheus wants it: the target's labels `service` and `instance`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric

MOST_TENANTS = 100
"""Tenants that have a series of their own in a process; what each used exactly is on the usage stream."""
OTHERS = "(others)"
"""Stands for all values of a label beyond those that have a series of their own."""


class Registry(CollectorRegistry):
    """A registry whose metrics all carry `labels`."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: dict[str, str] = {}

    def collect(self) -> Iterator[Metric]:
        """See `CollectorRegistry.collect`."""
        for family in super().collect():
            samples = [sample._replace(labels={**self.labels, **sample.labels}) for sample in family.samples]
            labelled = Metric(family.name, family.documentation, family.type, family.unit)
            labelled.samples = samples
            yield labelled

    def get_sample_value(self, name: str, labels: dict[str, str] | None = None) -> float | None:
        """See `CollectorRegistry.get_sample_value`. The process's own labels need not be given."""
        return super().get_sample_value(name, {**self.labels, **(labels or {})})


class Few:
    """Bounds the values of a label that come from outside: the first ones stay, the rest are `OTHERS` together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value to use."""
        if value not in self._known and len(self._known) >= self._most:
            return OTHERS
        self._known.add(value)
        return value


class Busy:
    """Counts the seconds in which at least one `with` block of it runs. They count while it still does."""

    def __init__(
        self, name: str, what: str, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`name` ends in `_seconds`; the counter is `<name>_total`. For one event loop, not for several threads."""
        self._name, self._what, self._clock = name, what, clock
        self._inside = 0
        self._since = 0.0
        self._before = 0.0
        registry.register(self)

    def __enter__(self) -> None:
        if not self._inside:
            self._since = self._clock()
        self._inside += 1

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._inside -= 1
        if not self._inside:
            self._before += self._clock() - self._since

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + (self._clock() - self._since if self._inside else 0.0)

    def describe(self) -> Iterable[Metric]:
        """See prometheus_client."""
        return [CounterMetricFamily(self._name, self._what)]

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        return [CounterMetricFamily(self._name, self._what, value=self.seconds)]
