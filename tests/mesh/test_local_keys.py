"""API keys as the command line makes them, and as a gateway takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.local import keys
from services.local.config import Paths
from shared.bus import Bus
from shared.errors import UserError
from tests.mesh.gateways import http
from tests.mesh.harness import Place, eventually


async def test_a_key_that_was_made_is_taken_until_it_is_revoked(place: Place, bus: Bus) -> None:
    key, record = await keys.create(bus, "team-a", label="for tests")
    async with place.gateway() as gateway, http(gateway.port, key) as client:
        assert await keys.gateway_url(bus) == f"http://127.0.0.1:{gateway.port}"
        assert (await client.get("get_server_capabilities")).status_code == 200
        await keys.revoke(bus, record.id)

        async def refused() -> bool | None:
            return (await client.get("get_server_capabilities")).status_code == 401 or None

        await eventually(refused)
    (listed,) = await keys.listed(bus)
    assert (listed.id, listed.tenant, listed.revoked is not None) == (record.id, "team-a", True)
    assert key not in repr(listed), "a key is kept nowhere"


async def test_the_single_user_keeps_a_key_that_only_they_can_read(bus: Bus, tmp_path: Path) -> None:
    paths = Paths.of(tmp_path / "data")
    key = await keys.ensure_default(bus, paths)
    assert key.startswith(keys.PREFIX)
    assert paths.api_key.stat().st_mode & 0o777 == 0o600
    assert await keys.ensure_default(bus, paths) == key
    (record,) = await keys.listed(bus)
    await keys.revoke(bus, record.id)
    assert await keys.ensure_default(bus, paths) != key
    assert keys.ensure_secret(paths).stat().st_mode & 0o777 == 0o600


async def test_what_is_no_tenant_or_no_key_is_refused(bus: Bus) -> None:
    with pytest.raises(UserError, match="'A Team' cannot be used"):
        await keys.create(bus, "A Team")
    with pytest.raises(UserError, match="no key 'key-0'"):
        await keys.revoke(bus, "key-0")
