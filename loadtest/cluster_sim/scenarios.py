"""What is simulated: load steps, bursts, real arrivals, lost nodes, metrics that lag or are gone."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from loadtest.cluster_sim.world import Arrival, Faults, Weather, World
from services.autoscaler.config import GroupConfig, ScalingConfig, ShapeConfig
from services.autoscaler.observed import Gpu


@dataclass(frozen=True)
class Scenario:
    """One simulation."""

    name: str
    groups: tuple[GroupConfig, ...]
    gpus: tuple[Gpu, ...]
    arrivals: tuple[Arrival, ...]
    seconds: float
    steps: tuple[float, ...] = ()
    """When the load steps, up or down."""
    weather: Weather = field(default_factory=Weather)
    faults: Faults = field(default_factory=Faults)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)

    def world(self, seed: int = 0) -> World:
        """A fresh cluster for it."""
        return World(self.groups, self.gpus, self.arrivals, self.weather, self.faults, self.scaling, seed)


def pool(name: str, milli: int = 250, memory_gib: float = 18.0, **more: object) -> GroupConfig:
    """Samplers of a small model: four share a GPU."""
    settings: dict[str, object] = {"max": 24, "slots": 32, **more}
    shape = ShapeConfig(memory_gib=memory_gib, milli=milli)
    return GroupConfig(name=name, role="sampler", base_model=name, shape=shape, **settings)  # type: ignore[arg-type]


def cluster(nodes: int = 4, gpus: int = 8) -> tuple[Gpu, ...]:
    """Nodes of 80 GiB GPUs."""
    return tuple(
        Gpu(f"node{node}/{index}", f"node{node}", 80.0, "H100") for node in range(nodes) for index in range(gpus)
    )


def poisson(name: str, rates: list[tuple[float, float]], end: float, seed: int = 1) -> list[Arrival]:
    """Sequences of 400 tokens on average, exponentially spread, at rates that hold from given times on."""
    draw = random.Random(f"{name} {seed}")
    arrivals = []
    for (begin, rate), (until, _) in pairwise([*rates, (end, 0.0)]):
        at = begin
        while rate and (at := at + draw.expovariate(rate)) < until:
            arrivals.append(Arrival(at, name, max(10.0, draw.expovariate(1 / 400))))
    return arrivals


def load_step(weather: Weather | None = None) -> Scenario:
    """Five times the load, then back: 10 seconds a sequence, so 40, 200 and 40 at the same time."""
    rates = [(0.0, 4.0), (900.0, 20.0), (2400.0, 4.0)]
    return Scenario(
        "load step", (pool("a", min=1),), cluster(), tuple(poisson("a", rates, 3900)), 3900, (900.0, 2400.0),
        weather or Weather(),
    )  # fmt: skip


def slow_metrics() -> Scenario:
    """The same, with metrics of every 15 s that are read 5 s later."""
    slow = load_step(Weather(scrape_seconds=15.0, lag_seconds=5.0))
    return Scenario("the same, scraped every 15 s", slow.groups, slow.gpus, slow.arrivals, slow.seconds, slow.steps,
                    slow.weather)  # fmt: skip


def bursts() -> Scenario:
    """Three RL jobs on three pools: every few minutes each asks for 512 sequences at once, and then trains."""
    arrivals = [
        Arrival(offset + period * number, name, 300.0, 512)
        for name, offset, period in (("a", 60.0, 240.0), ("b", 140.0, 300.0), ("c", 220.0, 200.0))
        for number in range(12)
    ]
    groups = (pool("a"), pool("b"), pool("c", milli=500, memory_gib=36.0))
    return Scenario("bursts", groups, cluster(), tuple(arrivals), 4200)


def node_loss() -> Scenario:
    """A steady load, and a node that is gone."""
    arrivals = [*poisson("a", [(0.0, 16.0)], 2400), *poisson("b", [(0.0, 8.0)], 2400)]
    faults = Faults(lost_nodes={"node0": 1200.0})
    return Scenario("node loss", (pool("a"), pool("b")), cluster(2, 4), tuple(arrivals), 2400, faults=faults)


def no_prometheus() -> Scenario:
    """Metrics are gone for 20 minutes in which the load goes to nothing, and come back."""
    arrivals = poisson("a", [(0.0, 12.0), (900.0, 0.0)], 4800)
    faults = Faults(no_metrics=(600.0, 1800.0))
    return Scenario("no Prometheus", (pool("a"),), cluster(1), tuple(arrivals), 4800, (900.0,), faults=faults)


def starvation() -> Scenario:
    """Four pools want more than there is; one has priority, one wants little."""
    rates = {"a": 40.0, "b": 40.0, "c": 1.0, "urgent": 10.0}
    arrivals = [each for name, rate in rates.items() for each in poisson(name, [(0.0, rate)], 2400)]
    groups = tuple(pool(name, priority=10 if name == "urgent" else 0) for name in rates)
    return Scenario("too few GPUs", groups, cluster(1, 4), tuple(arrivals), 2400)


def trace(directory: Path) -> Scenario:
    """An hour of two services' real requests (see docs/autoscaler.md for where they come from)."""
    arrivals = []
    for name in ("conv", "code"):
        with (directory / f"AzureLLMInferenceTrace_{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        first = datetime.fromisoformat(rows[0]["TIMESTAMP"][:26])
        for row in rows:
            at = (datetime.fromisoformat(row["TIMESTAMP"][:26]) - first).total_seconds()
            # Reading the prompt is about a fiftieth of the work of writing as many tokens.
            arrivals.append(Arrival(at, name, int(row["GeneratedTokens"]) + int(row["ContextTokens"]) / 50))
    groups = (pool("conv", min=1), pool("code", min=1))
    return Scenario("an hour of real requests", groups, cluster(), tuple(arrivals), 3900)


SCENARIOS: tuple[Callable[[], Scenario], ...] = (
    load_step, slow_metrics, bursts, node_loss, no_prometheus, starvation,
)  # fmt: skip
