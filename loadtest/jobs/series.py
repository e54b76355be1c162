"""What is asked of Prometheus, and what the answers come to."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STEP_SECONDS = 2
Points = list[tuple[float, float]]
"""Seconds since 1970, and a value."""


@dataclass(frozen=True)
class Phase:
    """Jobs that ran at the same time."""

    jobs: int
    begin: float
    end: float


@dataclass(frozen=True)
class Series:
    """A query whose answer is one line, or one for each value of a label."""

    name: str
    query: str
    label: str = ""


SERIES = (
    Series("jobs", "openrl:jobs_running:sum"),
    Series("replicas", "openrl_autoscaler_replicas", "group"),
    Series("gpu", "openrl:gpu_busy:ratio", "gpu"),
    Series("sequences", "openrl:pool_sequences_running:sum"),
    Series("queue", "openrl:pool_queued_sequences:max"),
    Series("sampled", "sum(rate(openrl_sampler_tokens_total{what='sampled'}[10s]))"),
    Series("trained", "sum(rate(openrl_trainer_tokens_total[10s]))"),
    Series("sampler_duty", "sum(rate(openrl_sampler_busy_seconds_total[10s]))"),
    Series("trainer_duty", "sum(rate(openrl_trainer_busy_seconds_total[10s]))"),
)


def fetch(url: str, series: Series, begin: float, end: float) -> dict[str, Points]:
    """The points of a series between two times, by its label's value. Empty: there are none."""
    asked = urllib.parse.urlencode({"query": series.query, "start": begin, "end": end, "step": STEP_SECONDS})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{asked}", timeout=30) as answer:
        result = json.load(answer)["data"]["result"]
    return {
        line["metric"].get(series.label, ""): [(float(at), float(value)) for at, value in line["values"]]
        for line in result
    }


def summary(phases: Sequence[Phase], found: Mapping[str, Mapping[str, Points]]) -> list[dict[str, float]]:
    """For each phase how long it took, and the means over it."""
    rows = []
    for phase in phases:
        row: dict[str, float] = {"jobs": phase.jobs, "seconds": round(phase.end - phase.begin, 1)}
        for name in ("sampled", "trained", "sampler_duty", "trainer_duty", "gpu"):
            values = [value for line in found[name].values() for at, value in line if phase.begin <= at <= phase.end]
            if values:
                row[name] = round(sum(values) / len(values), 3)
        replicas = [
            value for line in found["replicas"].values() for at, value in line if phase.begin <= at <= phase.end
        ]
        row["most_replicas_of_a_group"] = max(replicas, default=0)
        rows.append(row)
    return rows
