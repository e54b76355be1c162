"""Wiring of the autoscaler.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| plan | Prometheus, and what the actuator sees | `tick_seconds` | the clock |

Produces `ScalingDecided`, the newest plan in the bucket `plans`, and what the actuator does. Keeps only the last
minutes of loads; a new one begins with patience.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from services.autoscaler.actuator import Actuator, Cluster
from services.autoscaler.bus_actuator import BusActuator
from services.autoscaler.config import AutoscalerConfig
from services.autoscaler.events import events
from services.autoscaler.metrics import AutoscalerMetrics
from services.autoscaler.observed import Load, Observed
from services.autoscaler.plan import Memory, Plan
from services.autoscaler.policy import decide
from services.autoscaler.prometheus import Prometheus
from services.autoscaler.readings import loads
from services.autoscaler.telling import told
from shared import topology
from shared.contracts.placement import NEWEST_PLAN
from shared.contracts.replicas import SCALED
from shared.errors import MeshError, UserError
from shared.node import Node

log = logging.getLogger(__name__)


class AutoscalerService:
    """See the module's docstring."""

    base_model: str | None = None

    def __init__(self, config: AutoscalerConfig, node: Node, actuator: Actuator | None = None) -> None:
        if not config.groups:
            raise UserError("the autoscaler has no groups: its configuration names what it scales (docs/autoscaler.md)")
        self.offers: Sequence[str] = sorted({f"{SCALED}{group.role}:{group.base_model}" for group in config.groups})
        self._config = config
        self._node = node
        self._actuator = actuator or _actuator(config, node)
        self._prometheus: Prometheus | None = None
        self._metrics = AutoscalerMetrics(node.telemetry.registry)
        self._plans = node.bus.table(topology.PLANS)
        self._memory = Memory()
        self._last: Plan | None = None
        self._leading = False
        self._problems: frozenset[str] = frozenset()

    def activity(self) -> str:
        """See `Service.activity`."""
        if not self._leading:
            return "another one leads"
        if self._last is None:
            return "looking"
        if self._last.frozen:
            return self._last.frozen
        return f"{self._last.gpus_used} of {self._last.gpus} GPUs used" + (", dry run" if self._config.dry_run else "")

    async def start(self) -> None:
        """Begin to plan."""
        await self._actuator.start()
        self._prometheus = Prometheus(self._config.prometheus_url, self._config.scaling.fresh_seconds)
        self._node.tasks.start("plan", self._plan_for_ever())

    async def stop(self) -> None:
        """Let another one lead. What runs goes on."""
        try:
            await self._actuator.close()
        except MeshError as error:
            log.warning("the lead could not be given up, it expires: %s", error)
        if self._prometheus is not None:
            await self._prometheus.close()

    async def _plan_for_ever(self) -> None:
        while True:
            try:
                await self.tick()
            except MeshError as error:
                log.warning("no plan this time: %s", error)
            await asyncio.sleep(self._config.scaling.tick_seconds)

    async def tick(self) -> Plan | None:
        """One plan, carried out unless it is a dry run. None: another one leads."""
        self._leading = await self._actuator.lead()
        if not self._leading:
            self._memory, self._last = Memory(), None
            return None
        observed = await self._observe()
        now = time.time()
        with self._metrics.plan_seconds.time():
            plan, self._memory = await asyncio.to_thread(
                decide, observed, self._memory, self._config.groups, self._config.scaling, now
            )
        self._metrics.seen(observed)
        self._metrics.planned(plan)
        await self._tell(plan, observed, now)
        if not self._config.dry_run:
            await self._actuator.act(plan.starts, plan.drains)
        self._last = plan
        return plan

    async def _observe(self) -> Observed:
        cluster: Cluster = await self._actuator.look()
        for problem in sorted(set(cluster.problems) - self._problems):
            log.warning("%s", problem)
        self._problems = frozenset(cluster.problems)
        assert self._prometheus is not None, "tick comes after start"
        read = await self._prometheus.read()
        found: dict[str, Load] = {} if read is None else loads(read[0], self._config.groups, read[1])
        return Observed(found, cluster.replicas, cluster.gpus)

    async def _tell(self, plan: Plan, observed: Observed, now: float) -> None:
        dry_run = self._config.dry_run
        for event in events(plan, self._last, observed, now, dry_run=dry_run):
            log.info("%s", event.reason, extra={"group": event.group, "decision": event.decision})
            self._metrics.decisions.labels(event.group, event.decision, event.cause).inc()
            await self._node.bus.publish(topology.SCALING, event, group=event.group)
        await self._plans.put(NEWEST_PLAN, told(plan, observed, self._config.groups, now, dry_run=dry_run))


def _actuator(config: AutoscalerConfig, node: Node) -> Actuator:
    if config.actuator == "bus":
        return BusActuator(node, config.groups)
    try:
        from services.autoscaler.kubernetes.actuator import KubernetesActuator  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UserError(f"actuator = 'kubernetes' needs the extra of that name: {error}") from None
    return KubernetesActuator(config.kubernetes, config.groups, node.replica, node.drain_seconds, node.tasks)


def build(config: AutoscalerConfig, node: Node) -> AutoscalerService:
    """What `shared.process` calls."""
    return AutoscalerService(config, node)
