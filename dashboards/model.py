"""A dashboard as plain data: rows of panels, each with its queries. `dashboards.render` makes Grafana's JSON of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

RATE = "$__rate_interval"
"""Grafana's own: long enough for a rate, whatever the scrape interval and the zoom are."""
_METRIC = re.compile(r"\b(?:openrl[_:][a-z0-9_:]+|DCGM_[A-Z_]+|process_[a-z_]+|up(?=\{))")

Kind = Literal["lines", "stacked", "number", "timeline"]


@dataclass(frozen=True)
class Query:
    """A question to Prometheus, and how its answers are called in the legend."""

    expr: str
    legend: str

    @property
    def metrics(self) -> set[str]:
        """Names of the metrics and recorded series that it reads."""
        return set(_METRIC.findall(self.expr))


@dataclass(frozen=True)
class Panel:
    """One graph."""

    title: str
    description: str
    unit: str
    """Grafana's name of a unit: `short`, `s`, `bytes`, `percentunit`, …"""
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = 8
    """Of 24."""
    height: int = 8
    top: float | None = None
    """Upper end of the axis; None: as high as the data."""
    bottom: float | None = 0.0
    """Lower end of the axis; None: as low as the data, which may be negative."""


@dataclass(frozen=True)
class Row:
    """Panels below a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Choice:
    """A variable: values of a label to choose from, all by default."""

    name: str
    label: str
    of: str
    """Metric that has the label."""
    values: str
    """The label."""


@dataclass(frozen=True)
class Mark:
    """Moments that are drawn into all graphs of a page: whenever the query has a value."""

    name: str
    query: Query
    text: str
    """What is shown there, with `{{label}}`s."""


@dataclass(frozen=True)
class Page:
    """One dashboard."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    choices: tuple[Choice, ...] = ()
    marks: tuple[Mark, ...] = ()

    def panels(self) -> Iterator[Panel]:
        """All of them, in order."""
        for row in self.rows:
            yield from row.panels

    def queries(self) -> Iterator[tuple[str, Query]]:
        """All of them, with the title of the panel or mark."""
        for panel in self.panels():
            for query in panel.queries:
                yield panel.title, query
        for mark in self.marks:
            yield mark.name, mark.query


def quantiles(histogram: str, by: str, where: str = "", legend: str = "") -> tuple[Query, ...]:
    """Median and 95th percentile of a histogram, for each value of the labels `by`."""
    buckets = f"sum by (le, {by}) (rate({histogram}_bucket{{{where}}}[{RATE}]))"
    return tuple(
        Query(f"histogram_quantile({part}, {buckets})", f"{legend or f'{{{{{by}}}}}'} {name}")
        for part, name in ((0.5, "median"), (0.95, "95 %"))
    )


def lines(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    width: int = 8,
    top: float | None = None,
    bottom: float | None = 0.0,
) -> Panel:
    """Lines over time."""
    return Panel(title, description, unit, queries, width=width, top=top, bottom=bottom)


def stacked(title: str, description: str, *queries: Query, unit: str = "short", width: int = 8) -> Panel:
    """Areas one on the other, where the sum means something."""
    return Panel(title, description, unit, queries, kind="stacked", width=width)


def number(title: str, description: str, query: Query, *, unit: str = "short", width: int = 4) -> Panel:
    """The newest value, large."""
    return Panel(title, description, unit, (query,), kind="number", width=width, height=4)


def share(title: str, description: str, *queries: Query, width: int = 8) -> Panel:
    """Lines between 0 and 100 %."""
    return lines(title, description, *queries, unit="percentunit", width=width, top=1.0)
