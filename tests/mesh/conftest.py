"""Fixtures of the mesh tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.local.nats_server import NatsServer
from shared.bus import Bus
from tests.mesh.gateway_records import ADMIN_KEY, Records
from tests.mesh.gateways import OTHER_KEY, add_key
from tests.mesh.harness import Place


@pytest.fixture
def place(nats_server: NatsServer, tmp_path: Path, tiny_model: Path) -> Place:
    """Where this test's mesh lives."""
    return Place(nats_server.url, tmp_path, tiny_model)


@pytest.fixture
async def records(bus: Bus) -> Records:
    """What to look up can be written with it. There are keys of three tenants, one of them an administrator's."""
    await add_key(bus)
    await add_key(bus, OTHER_KEY, tenant="other")
    await add_key(bus, ADMIN_KEY, tenant="boss", admin=True)
    return Records(bus)


@pytest.fixture
async def gateway(place: Place, records: Records) -> AsyncIterator[str]:
    """Where a gateway over these records answers."""
    async with place.gateway(exchange_keys=True) as service:
        yield f"http://127.0.0.1:{service.port}"
