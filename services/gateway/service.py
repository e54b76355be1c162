"""Wiring of a gateway.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| requests | HTTP on `port` | one direct answer of the bus; polls: a result | the bus; a worker that answers |
| results, one a session in use | `rl.v1.results.SESSION.>` | nothing | a worker that answers |
| mirrors | all buckets of what clients own, keys, tenants, aliases, replicas | nothing | a change |
| sessions in use | - | a second | the clock |
"""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.app import make_app
from services.gateway.auth import Callers
from services.gateway.config import GatewayConfig
from services.gateway.context import Gateway
from services.gateway.endpoints import ENDPOINTS
from services.gateway.hub import Hub
from services.gateway.limits import InFlight
from services.gateway.metrics import GatewayMetrics
from services.gateway.mirrors import Mirror
from services.gateway.models import Models
from services.gateway.records import Records
from services.gateway.server import HttpServer
from services.gateway.signing import Signer
from shared import topology
from shared.contracts.replicas import HTTP
from shared.node import Node


class GatewayService:
    """One gateway."""

    base_model: str | None = None

    def __init__(self, config: GatewayConfig, node: Node) -> None:
        self._node = node
        self._gateway = make_gateway(config, node)
        self._server = HttpServer(make_app(self._gateway, ENDPOINTS), config)

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self._server.port

    @property
    def offers(self) -> Sequence[str]:
        """See `Service.offers`: where it answers."""
        return (f"{HTTP}{self.port}",)

    def activity(self) -> str:
        """See `Service.activity`."""
        gateway = self._gateway
        return f"{len(gateway.in_flight)} requests in flight, {gateway.hub.waiting} polls waiting"

    async def start(self) -> None:
        """Know keys and models, then take requests."""
        gateway, tasks = self._gateway, self._node.tasks
        await gateway.signer.agree(gateway.bus.table(topology.SECRETS))
        await gateway.callers.start(tasks)
        await gateway.models.start(tasks)
        await gateway.runs.start(tasks, "runs")
        await gateway.sessions.start(tasks, "sessions")
        await gateway.samplers.start(tasks, "samplers")
        await gateway.run_activity.start(tasks, "activity")
        await gateway.checkpoints.start(tasks, "checkpoints")
        await gateway.inflight_policies.start(tasks, "policies in flight")
        gateway.hub.start(tasks)
        self._serving = tasks.start("http", self._server.serve())
        await self._server.started()

    async def stop(self) -> None:
        """Tell whoever polls to try again, and finish what is being answered."""
        self._server.stop()
        await self._gateway.hub.close()
        if hasattr(self, "_serving"):
            await self._serving


def make_gateway(config: GatewayConfig, node: Node) -> Gateway:
    """The parts, put together."""
    bus = node.bus
    signer = Signer.of(config.secret_file)
    in_flight = InFlight()
    hub = Hub(bus, in_flight, cached_bytes=config.cached_result_bytes, idle_seconds=config.session_idle_seconds)
    metrics = GatewayMetrics(node.telemetry.registry)
    metrics.watch(lambda: hub.waiting, lambda: len(in_flight), lambda: hub.kept_bytes)
    return Gateway(
        config=config,
        bus=bus,
        blobs=node.blobs,
        tasks=node.tasks,
        callers=Callers(bus, signer),
        signer=signer,
        hub=hub,
        records=Records(bus),
        models=Models(bus),
        in_flight=in_flight,
        metrics=metrics,
        runs=Mirror(bus.table(topology.RUNS)),
        sessions=Mirror(bus.table(topology.SESSIONS)),
        samplers=Mirror(bus.table(topology.SAMPLERS)),
        run_activity=Mirror(bus.table(topology.ACTIVITY)),
        checkpoints=Mirror(bus.table(topology.CHECKPOINTS)),
        inflight_policies=Mirror(bus.table(topology.INFLIGHT)),
    )
