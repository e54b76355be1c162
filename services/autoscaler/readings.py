"""From what Prometheus answers to the loads of groups. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from services.autoscaler.config import GroupConfig
from services.autoscaler.observed import Load, Measured

BUS_LOOK = "openrl:bus_look_age_seconds:min"
"""How old the coordinators' own view of the bus is, which the queues' lengths are of."""
SELECTOR = f'{{__name__=~"openrl:(pool|trainer)_.+|{BUS_LOOK}"}}'

SAMPLERS = {
    "queued": "openrl:pool_queued_sequences:max",
    "oldest": "openrl:pool_oldest_seconds:max",
    "running": "openrl:pool_sequences_running:sum",
    "waiting": "openrl:pool_sequences_waiting:sum",
    "finished": "openrl:pool_sequences_finished:rate1m",
    "kv_cache": "openrl:pool_kv_cache:avg",
    "tokens": "openrl:pool_tokens:rate1m",
}
"""Which recording rule (dashboards/rules.yml) says what of a group of samplers."""
TRAINERS = {
    "queued": "openrl:trainer_queued_operations:max",
    "oldest": "openrl:trainer_oldest_seconds:max",
    "backlog": "openrl:trainer_backlog_tokens:sum",
    "duty": "openrl:trainer_duty:avg6s",
    "tokens": "openrl:trainer_tokens:rate1m",
}
FROM_BUS = frozenset({"queued", "oldest"})


class Labels(msgspec.Struct):
    """What tells the series apart that are asked for."""

    name: str = msgspec.field(name="__name__")
    base_model: str = ""


class Series(msgspec.Struct):
    """A series, with its samples of the last while."""

    metric: Labels
    values: list[tuple[float, str]]


class Data(msgspec.Struct):
    """The answer's content."""

    result: list[Series]


class Answered(msgspec.Struct):
    """What Prometheus answers to a query for a range of samples (its HTTP API, version 1)."""

    status: str
    data: Data


def loads(answered: Sequence[Series], groups: Iterable[GroupConfig], now: float) -> dict[str, Load]:
    """The load of each group. `now` is Prometheus's clock, in seconds since 1970, as its samples' are."""
    newest = {(series.metric.name, series.metric.base_model): series.values[-1] for series in answered if series.values}
    numbers = {key: (at, float(value)) for key, (at, value) in newest.items()}
    measured = {
        key: Measured(value, max(0.0, now - at)) for key, (at, value) in numbers.items() if math.isfinite(value)
    }
    look = measured.get((BUS_LOOK, ""))
    return {group.name: _load(measured, group, look) for group in groups}


def _load(measured: Mapping[tuple[str, str], Measured], group: GroupConfig, look: Measured | None) -> Load:
    rules = SAMPLERS if group.role == "sampler" else TRAINERS
    found = {field: measured.get((rule, group.base_model)) for field, rule in rules.items()}
    # A pool of which the bus has nothing has no series of its own: it has no queue. That is known as long as somebody
    # looks at the bus.
    for field in FROM_BUS:
        found[field] = _seen_on_bus(found.get(field), look)
    return Load(**found)


def _seen_on_bus(value: Measured | None, look: Measured | None) -> Measured | None:
    if look is None:
        return None
    age = look.value + look.age
    return Measured(0.0, age) if value is None else Measured(value.value, value.age + look.value)
