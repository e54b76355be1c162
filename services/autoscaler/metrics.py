"""What the autoscaler measures, and what of its plans can be seen over time."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.autoscaler.observed import Observed
from services.autoscaler.plan import Plan


class AutoscalerMetrics:
    """The autoscaler's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.wanted = Gauge(
            "openrl_autoscaler_replicas_wanted", "Replicas that a group should have", ["group"], registry=registry
        )
        self.have = Gauge(
            "openrl_autoscaler_replicas", "Replicas that start or are ready", ["group"], registry=registry
        )
        self.unmet = Gauge(
            "openrl_autoscaler_replicas_unmet", "Replicas that are wanted and cannot start", ["group"],
            registry=registry,
        )  # fmt: skip
        self.work = Gauge(
            "openrl_autoscaler_work", "Replicas that the load would keep busy all the time", ["group"],
            registry=registry,
        )  # fmt: skip
        self.held = Gauge(
            "openrl_autoscaler_held", "1 while a group is held for want of metrics", ["group"], registry=registry
        )
        self.decisions = Counter(
            "openrl_autoscaler_decisions_total", "Decisions by kind and cause", ["group", "decision", "cause"],
            registry=registry,
        )  # fmt: skip
        self.gpus = Gauge("openrl_autoscaler_gpus", "GPUs in the inventory", registry=registry)
        self.gpus_used = Gauge("openrl_autoscaler_gpus_used", "Of these, with a replica on them", registry=registry)
        self.placed = Gauge(
            "openrl_autoscaler_replica_milli", "Thousandths of a GPU that a replica has",
            ["replica", "group", "node", "gpu"], registry=registry,
        )  # fmt: skip
        self.frozen = Gauge(
            "openrl_autoscaler_frozen", "1 while nothing is done at all, since GPUs cannot be listed", registry=registry
        )
        self.plan_seconds = Histogram(
            "openrl_autoscaler_plan_seconds", "Making a plan", registry=registry,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        )  # fmt: skip

    def seen(self, observed: Observed) -> None:
        """Show which replica is where."""
        nodes = {gpu.name: gpu.node for gpu in observed.gpus or ()}
        self.placed.clear()
        for replica in observed.replicas:
            for gpu in replica.gpus:
                labels = replica.name, replica.group, nodes.get(gpu, ""), gpu.rpartition("/")[2]
                self.placed.labels(*labels).set(replica.shape.milli)

    def planned(self, plan: Plan) -> None:
        """Show a plan."""
        self.frozen.set(bool(plan.frozen))
        if plan.frozen:
            return
        self.gpus.set(plan.gpus)
        self.gpus_used.set(plan.gpus_used)
        for group in plan.groups:
            self.wanted.labels(group.group).set(group.target.wanted)
            self.have.labels(group.group).set(group.have)
            self.held.labels(group.group).set(group.target.why == "hold")
            self.unmet.labels(group.group).set(_of(group.group, (each.group for each in plan.unmet)))
            if group.target.work is not None:
                self.work.labels(group.group).set(group.target.work.replicas)


def _of(group: str, groups: Iterable[str]) -> int:
    return sum(each == group for each in groups)
