"""Configuration of the autoscaler: the groups that it scales, and how patient it is. Provenance: docs/autoscaler.md."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from services.autoscaler.kubernetes.config import KubernetesConfig
from services.autoscaler.observed import WHOLE, Shape
from shared.config import ServiceConfig
from shared.contracts.base import Name, Strict

Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class ShapeConfig(Strict):
    """What one replica needs."""

    memory_gib: Positive
    """Memory of each GPU that the replica may use."""
    milli: Annotated[int, msgspec.Meta(ge=1, le=WHOLE)] = WHOLE
    """Thousandths of a GPU's compute; 1000: the GPU to itself."""
    gpus: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """GPUs of one node; more than one are whole ones."""
    types: str = ""
    """Types of GPU that will do, as `A100|H100`. Empty: any."""

    def __post_init__(self) -> None:
        if self.gpus > 1 and self.milli != WHOLE:
            raise ValueError(f"a replica on {self.gpus} GPUs with {self.milli} milli of each: several are whole ones")

    def shape(self) -> Shape:
        """The same, as the policy takes it."""
        types = frozenset(part.strip() for part in self.types.split("|") if part.strip())
        return Shape(self.memory_gib, self.milli, self.gpus, types)


class GroupConfig(Strict):
    """The samplers, or the trainers, of one base model."""

    name: Name
    """For people, metrics and subjects: `smollm2-samplers`."""
    role: Literal["sampler", "trainer"]
    base_model: str
    """Name under which runs and jobs ask for it."""
    shape: ShapeConfig
    min: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Replicas even without work. 0: the group may go to zero when it is idle."""
    max: Annotated[int, msgspec.Meta(ge=1)] = 8
    priority: int = 0
    """Who gets room when it is short: the higher number."""
    pod_template: str = ""
    """In Kubernetes: the PodTemplate that replicas are made from. Empty: the one of the group's name."""
    slots: Annotated[int, msgspec.Meta(ge=1)] = 32
    """Samplers: sequences that a replica generates at the same time."""
    sequence_seconds: Positive = 20.0
    """Samplers: time in which a sequence is generated, used until it has been measured."""
    tokens_per_second: Positive = 10_000.0
    """Trainers: speed of a busy replica, used until it has been measured."""
    target: Share = 0.7
    """How full replicas should be. The rest is room for what comes before more are ready."""
    clear_seconds: Positive = 120.0
    """Time in which work that has piled up should be gone. Shorter buys replicas that are ready when it is gone."""
    idle_seconds: Positive = 600.0
    """Without any work for so long, the group goes to zero."""
    start_seconds: Positive = 120.0
    """What starting a replica takes: the price of a move."""

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"group {self.name}: min {self.min} is more than max {self.max}")


class ScalingConfig(Strict):
    """How patient the policy is; the same for all groups."""

    tick_seconds: Positive = 2.0
    """Time between two plans."""
    stable_seconds: Positive = 60.0
    """Window whose average decides as a rule."""
    panic_seconds: Positive = 6.0
    """Window whose average decides when load jumps."""
    panic_threshold: Annotated[float, msgspec.Meta(gt=1)] = 2.0
    """Load jumps when the short window wants so many times the replicas that are ready."""
    fresh_seconds: Positive = 45.0
    """A metric that is older counts as missing: three scrapes of 15 s."""
    down_seconds: Positive = 300.0
    """Replicas are given up when none of them was wanted for so long."""
    down_margin: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    """And when those that stay would have so much of their target to spare."""
    settle_seconds: Positive = 300.0
    """Replicas are moved to free a GPU only when no group's number has changed for so long."""
    payback_seconds: Positive = 600.0
    """And when a freed GPU makes up for the GPU time of the moves within this time."""
    most_moves: Annotated[int, msgspec.Meta(ge=0)] = 4
    """Replicas that may be on the move at the same time in order to free GPUs."""


class AutoscalerConfig(ServiceConfig, frozen=True, kw_only=True):
    """What the autoscaler is told."""

    groups: list[GroupConfig] = []
    scaling: ScalingConfig = ScalingConfig()
    prometheus_url: str = "http://127.0.0.1:9090"
    """Where metrics are read."""
    actuator: Literal["bus", "kubernetes"] = "bus"
    """Who carries plans out: supervisors of machines that follow the bus, or Kubernetes."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """For the latter: where, and how GPUs are given."""
    dry_run: bool = False
    """Plan and say so, but change nothing."""
