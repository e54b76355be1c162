"""The simulated cluster: sequences arrive, replicas start, serve, drain and die, metrics lag. Deterministic.

A sampler replica generates `slots` sequences at a time, and each gives `speed` tokens a second, so that a sequence of
`n` tokens holds a slot for `n / speed` seconds. Sequences wait in one queue per pool, first come, first served.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean

from services.autoscaler.config import GroupConfig, ScalingConfig
from services.autoscaler.observed import Gpu, Load, Measured, Observed, Replica
from services.autoscaler.plan import Memory, Plan
from services.autoscaler.policy import decide

STEP = 1.0
"""Seconds of simulated time."""


@dataclass(frozen=True)
class Arrival:
    """Sequences that are asked for at the same time."""

    at: float
    pool: str
    tokens: float
    """Of each."""
    sequences: int = 1


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and when."""

    lost_nodes: Mapping[str, float] = field(default_factory=dict)
    """When a node goes."""
    no_metrics: tuple[float, float] = (-1.0, -1.0)
    """From when to when Prometheus is away."""


@dataclass(frozen=True)
class Weather:
    """How slow things are."""

    start_seconds: tuple[float, float] = (60.0, 200.0)
    """Starting a replica takes something between these."""
    scrape_seconds: float = 2.0
    """Time between two measurements of a replica."""
    lag_seconds: float = 0.0
    """Time until a measurement can be read."""
    speed: float = 40.0
    """Tokens a second of one sequence."""


class Pool:
    """The work of one pool."""

    def __init__(self, config: GroupConfig) -> None:
        self.config = config
        self.queue: deque[tuple[float, float]] = deque()
        """When each waiting sequence came, and its tokens."""
        self.running: dict[str, list[tuple[float, float, float]]] = {}
        """By replica, a heap of when each sequence ends, when it came, and its tokens."""
        self.waits: list[float] = []
        self.finished = 0
        self.asked = 0

    @property
    def busy(self) -> int:
        """Sequences that run."""
        return sum(len(heap) for heap in self.running.values())


@dataclass
class Record:
    """What happened, second by second or decision by decision."""

    wanted: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By group, each change of the number."""
    ready: dict[str, list[int]] = field(default_factory=dict)
    gpus: list[int] = field(default_factory=list)
    waiting: dict[str, list[int]] = field(default_factory=dict)
    plans: list[tuple[float, Plan]] = field(default_factory=list)
    """Those that changed something."""
    holds: int = 0
    """Plans in which a group was held."""
    moves: int = 0
    busiest: dict[str, int] = field(default_factory=dict)
    """By pool, the most sequences that ran at the same time."""


class World:
    """The cluster, the policy, and time."""

    def __init__(
        self, groups: Sequence[GroupConfig], gpus: Sequence[Gpu], arrivals: Sequence[Arrival], weather: Weather,
        faults: Faults, scaling: ScalingConfig, seed: int = 0, *, fixed: bool = False,
    ) -> None:  # fmt: skip
        """`fixed`: the replicas that are there stay, and nothing is planned."""
        self.pools = {config.name: Pool(config) for config in groups}
        self.groups, self.scaling, self.weather, self.faults = list(groups), scaling, weather, faults
        self.gpus = tuple(gpus)
        self.replicas: dict[str, Replica] = {}
        self.now = 0.0
        self.record = Record()
        self._ready_at: dict[str, float] = {}
        self._arrivals = deque(sorted(arrivals, key=lambda each: each.at))
        self._memory = Memory()
        self._draw = random.Random(seed)
        self._scrapes: deque[tuple[float, dict[str, tuple[float, float, float]]]] = deque()
        self._finished_before: dict[str, int] = {}
        self._fixed = fixed

    def add_ready(self, group: str, gpus: tuple[str, ...]) -> None:
        """Put a replica that serves already."""
        name = f"{group}-{sum(each.group == group for each in self.replicas.values())}"
        shape = self.pools[group].config.shape.shape()
        self.replicas[name] = Replica(name, group, "ready", gpus, shape)

    def run(self, seconds: float) -> Record:
        """Let so much time pass."""
        end = self.now + seconds
        while self.now < end:
            self._lose_nodes()
            self._arrive()
            self._become_ready()
            self._serve()
            if self.now % self.weather.scrape_seconds < STEP:
                self._scrape()
            if not self._fixed and self.now % self.scaling.tick_seconds < STEP:
                self._plan()
            self._note()
            self.now += STEP
        return self.record

    def _lose_nodes(self) -> None:
        gone = {node for node, at in self.faults.lost_nodes.items() if at <= self.now}
        lost = {gpu.name for gpu in self.gpus if gpu.node in gone}
        if not lost:
            return
        self.gpus = tuple(gpu for gpu in self.gpus if gpu.name not in lost)
        for replica in list(self.replicas.values()):
            if lost & set(replica.gpus):
                pool = self.pools[replica.group]
                for _, came, tokens in sorted(pool.running.pop(replica.name, []), reverse=True):
                    pool.queue.appendleft((came, tokens))  # the bus gives them to others
                del self.replicas[replica.name]

    def _arrive(self) -> None:
        while self._arrivals and self._arrivals[0].at <= self.now:
            arrival = self._arrivals.popleft()
            pool = self.pools[arrival.pool]
            pool.asked += arrival.sequences
            pool.queue.extend([(arrival.at, arrival.tokens)] * arrival.sequences)

    def _become_ready(self) -> None:
        for name, at in list(self._ready_at.items()):
            if name not in self.replicas or self.replicas[name].state != "starting":
                del self._ready_at[name]
            elif at <= self.now:
                self.replicas[name] = replace(self.replicas[name], state="ready")
                del self._ready_at[name]

    def _serve(self) -> None:
        for replica in list(self.replicas.values()):
            pool = self.pools[replica.group]
            heap = pool.running.setdefault(replica.name, [])
            while heap and heap[0][0] <= self.now:
                heapq.heappop(heap)
                pool.finished += 1
            if replica.state == "draining" and not heap:
                del self.replicas[replica.name]
                del pool.running[replica.name]
            while replica.state == "ready" and pool.queue and len(heap) < pool.config.slots:
                came, tokens = pool.queue.popleft()
                pool.waits.append(self.now - came)
                heapq.heappush(heap, (self.now + tokens / self.weather.speed, came, tokens))

    def _scrape(self) -> None:
        low, high = self.faults.no_metrics
        if low <= self.now < high:
            return
        values = {}
        for name, pool in self.pools.items():
            before = self._finished_before.get(name, 0)
            rate = (pool.finished - before) / self.weather.scrape_seconds
            self._finished_before[name] = pool.finished
            values[name] = (float(len(pool.queue)), float(pool.busy), rate)
        self._scrapes.append((self.now, values))
        while len(self._scrapes) > 1 and self._scrapes[1][0] <= self.now - self.weather.lag_seconds:
            self._scrapes.popleft()

    def _loads(self) -> dict[str, Load]:
        if not self._scrapes or self._scrapes[0][0] > self.now - self.weather.lag_seconds:
            return {}
        at, values = self._scrapes[0]
        age = self.now - at
        return {
            name: Load(
                queued=Measured(queue, age), running=Measured(busy, age), waiting=Measured(0.0, age),
                finished=Measured(rate, age),
            )
            for name, (queue, busy, rate) in values.items()
        }  # fmt: skip

    def _plan(self) -> None:
        while len(self._scrapes) > 1 and self._scrapes[1][0] <= self.now - self.weather.lag_seconds:
            self._scrapes.popleft()
        observed = Observed(self._loads(), tuple(self.replicas.values()), self.gpus)
        plan, self._memory = decide(observed, self._memory, self.groups, self.scaling, self.now)
        for group in plan.groups:
            changes = self.record.wanted.setdefault(group.group, [])
            if not changes or changes[-1][1] != group.target.wanted:
                changes.append((self.now, group.target.wanted))
            self.record.holds += group.target.why == "hold"
        if plan.changes:
            self.record.plans.append((self.now, plan))
        for start in plan.starts:
            self.replicas[start.replica] = Replica(
                start.replica, start.group, "starting", start.gpus, start.shape, self.now, start.replaces
            )
            self._ready_at[start.replica] = self.now + self._draw.uniform(*self.weather.start_seconds)
            self.record.moves += bool(start.replaces)
        for drain in plan.drains:
            self.replicas[drain.replica] = replace(self.replicas[drain.replica], state="draining")

    def _note(self) -> None:
        self.record.gpus.append(len({gpu for each in self.replicas.values() for gpu in each.gpus}))
        for name, pool in self.pools.items():
            ready = sum(each.group == name and each.state == "ready" for each in self.replicas.values())
            self.record.ready.setdefault(name, []).append(ready)
            self.record.busiest[name] = max(pool.busy, self.record.busiest.get(name, 0))
            self.record.waiting.setdefault(name, []).append(len(pool.queue))


def reversals(changes: Sequence[tuple[float, int]]) -> int:
    """How often a number turned from rising to falling, or back: a load that goes up and down again causes one."""
    signs = [1 if later > earlier else -1 for (_, earlier), (_, later) in pairwise(changes)]
    return sum(one != other for one, other in pairwise(signs))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def mean(values: Sequence[float]) -> float:
    """Average; 0 of nothing."""
    return fmean(values) if values else 0.0
