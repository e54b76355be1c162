"""The whole autoscaler on a cluster: from a request that waits to a pod that is ready, and back to none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.autoscaler.config import AutoscalerConfig, GroupConfig, ScalingConfig, ShapeConfig
from services.autoscaler.kubernetes.api import configuration
from services.autoscaler.readings import SAMPLERS
from services.autoscaler.service import AutoscalerService, build
from shared.errors import UserError
from shared.process import running
from tests.k8s.fake_api import FakeApi
from tests.k8s.fake_cluster import NAMESPACE, FakeCluster
from tests.mesh.harness import Place, eventually
from tests.mesh.test_autoscaler import MODEL, FakePrometheus
from tests.mesh.test_autoscaler import prometheus as prometheus  # noqa: PLC0414 - a fixture

GROUP = GroupConfig(
    name="samplers", role="sampler", base_model=MODEL, shape=ShapeConfig(memory_gib=70.0), slots=4, max=3,
    idle_seconds=0.5,
)  # fmt: skip
KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{{name: fake, cluster: {{server: "{url}"}}}}]
users: [{{name: me, user: {{token: secret}}}}]
contexts: [{{name: fake, context: {{cluster: fake, user: me}}}}]
current-context: fake
"""


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    api = FakeApi()
    server = await api.serve()
    (tmp_path / "kubeconfig").write_text(KUBECONFIG.format(url=str(server.make_url("")).rstrip("/")))
    found = FakeCluster(api)
    await found.node("n0", gpus=2)
    await found.template("samplers")
    yield found
    api.break_off()
    await server.close()


@contextlib.asynccontextmanager
async def autoscaler(place: Place, prometheus: FakePrometheus, tmp_path: Path) -> AsyncIterator[AutoscalerService]:
    settings: dict[str, Any] = {
        **place.common,
        "groups": [GROUP],
        "scaling": ScalingConfig(tick_seconds=0.05, down_seconds=0.2, stable_seconds=1.0, panic_seconds=0.2),
        "prometheus_url": prometheus.url,
        "actuator": "kubernetes",
        "kubernetes": {"namespace": NAMESPACE, "kubeconfig": str(tmp_path / "kubeconfig"), "watch_seconds": 2},
    }
    config = msgspec.convert(settings, AutoscalerConfig)
    async with running("autoscaler", config, build) as (service, _):
        assert isinstance(service, AutoscalerService)
        yield service


async def test_a_request_wakes_a_pod_and_idleness_ends_it(
    place: Place, prometheus: FakePrometheus, cluster: FakeCluster, tmp_path: Path
) -> None:
    async def ready() -> bool | None:
        await cluster.step()
        return any(one["status"]["phase"] == "Running" for one in cluster.pods().values()) or None

    async def gone() -> bool | None:
        await cluster.step()
        return not cluster.pods() or None

    async with autoscaler(place, prometheus, tmp_path) as service:
        prometheus.values = {SAMPLERS["queued"]: 1.0}
        await eventually(ready)
        # The API server is away for a while: the service goes on when it is back.
        cluster.api.go_down()
        await asyncio.sleep(0.3)
        cluster.api.down = False
        prometheus.values = {SAMPLERS["queued"]: 0.0, SAMPLERS["running"]: 0.0, SAMPLERS["waiting"]: 0.0}
        await eventually(gone)
        assert "GPUs used" in service.activity()
    lease = cluster.store.get(("coordination.k8s.io/v1", "leases"), "openrl-autoscaler")
    assert lease["spec"]["holderIdentity"] == ""


@pytest.mark.parametrize("kubeconfig", ["", "/no/such/file"])
async def test_without_a_way_to_an_api_server_the_service_says_what_to_set(kubeconfig: str) -> None:
    with pytest.raises(UserError, match="kubeconfig"):
        await configuration(kubeconfig)
