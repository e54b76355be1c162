"""Every panel of every dashboard has data, from a real Prometheus that scrapes a mesh while it works on a job.

What a machine without GPUs cannot measure, and what services say that are not in this mesh, comes from `FakeExporter`
under the same names. All the rest is of the mesh; there is no panel that stays empty when all goes well.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dashboards.build import PAGES
from services.environment.config import EnvironmentConfig
from services.environment.service import EnvironmentService
from services.local.config import Paths
from services.local.prometheus import Prometheus
from services.reward.config import RewardConfig
from services.reward.service import RewardService
from shared import topology
from shared.bus import Bus
from shared.contracts.replicas import ReplicaRecord
from shared.process import running
from tests.mesh.fake_exporter import FakeExporter
from tests.mesh.harness import MODEL, Place, eventually
from tests.mesh.prometheus_api import Api, need_prometheus
from tests.mesh.test_jobs import job, submit

WINDOWS = {
    "$__rate_interval": "20s",
    "$__range": "2m",
    "$__interval": "5s",
    "$job_id": ".*",
    "$base_model": ".*",
    "$tenant": ".*",
}
"""What Grafana would put in."""


@contextlib.asynccontextmanager
async def watched(bus: Bus, tmp_path: Path) -> AsyncIterator[Api]:
    """A Prometheus that scrapes whoever is in the `replicas` bucket, and the fake exporter."""
    paths = Paths.of(tmp_path / "watch")
    paths.make()
    prometheus = Prometheus(paths, port=0)
    runner, port = await FakeExporter().serve()
    fake = ReplicaRecord(replica="fake", service="gpu_exporter", pid=1, host="127.0.0.1", metrics_port=port)

    async def keep_targets() -> None:
        while True:
            entries = await bus.table(topology.REPLICAS).items()
            prometheus.show([*(entry.value for entry in entries), fake])
            await asyncio.sleep(0.2)

    process = await prometheus.launch()
    keeping = asyncio.create_task(keep_targets())
    try:
        yield Api(prometheus.url)
    finally:
        keeping.cancel()
        process.terminate()
        await process.wait()
        await runner.cleanup()


def filled(expression: str) -> str:
    for name, value in WINDOWS.items():
        expression = expression.replace(name, value)
    assert not re.search(r"\$[a-z_]", expression), expression
    return expression


async def empty_panels(api: Api) -> set[str]:
    """Titles, with the query, of what has no value at this moment."""
    found = set()
    for page in PAGES:
        for title, query in page.queries():
            samples = await api.query(filled(query.expr))
            if not [sample for sample in samples if sample["value"][1] != "NaN"]:
                found.add(f"{page.title} / {title}: {query.expr}")
    return found


@contextlib.asynccontextmanager
async def crowded_mesh(place: Place) -> AsyncIterator[None]:
    """All services. Of two runs only one fits on the trainer's device, so runs go and come back."""
    models = {MODEL: str(place.model_dir)}
    async with (
        running("environment", EnvironmentConfig(**place.common, models=models), EnvironmentService),
        running("reward", RewardConfig(**place.common), RewardService),
        place.sampler(),
        place.trainer(max_resident_runs=1),
        place.coordinator(),
    ):
        yield


@pytest.mark.timeout(300)
async def test_every_query_of_every_panel_returns_data(place: Place, bus: Bus, tmp_path: Path) -> None:
    need_prometheus()
    async with watched(bus, tmp_path) as api, crowded_mesh(place):
        endless = {"steps": 4_000, "group_size": 4, "groups_per_step": 2, "learning_rate": 0.001}
        for name in ("one", "two"):
            answer = await submit(bus, job(name=name, algorithm=endless))
            assert answer.job is not None, answer.errors
        missing: set[str] = set()

        async def all_filled() -> bool | None:
            nonlocal missing
            missing = await empty_panels(api)
            return True if not missing else None

        try:
            await eventually(all_filled, 240)
        except TimeoutError:
            pytest.fail("these have no data:\n" + "\n".join(sorted(missing)))
