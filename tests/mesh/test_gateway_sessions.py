"""Sessions over HTTP: whose they are, and how they begin and end."""

from __future__ import annotations

from shared import topology
from shared.bus import Bus
from tests.mesh.gateways import KEY, OTHER_KEY, add_key, http, new_session
from tests.mesh.harness import Place, eventually


async def test_a_session_is_recorded_kept_alive_and_ended(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.gateway() as gateway, http(gateway.port) as client:
        session = await new_session(client)
        record = await bus.table(topology.SESSIONS).get(session)
        assert record is not None
        assert (record.value.owner, record.value.ended) == ("default", None)
        assert (await client.post("session_heartbeat", json={"session_id": session})).status_code == 200
        ended = await client.post(f"sessions/{session}/finish", json={"reason": {"type": "success"}, "detail": "done"})
        assert ended.status_code == 204
        record = await bus.table(topology.SESSIONS).get(session)
        assert record is not None
        assert (record.value.ended, record.value.end_detail) == ("success", "done")
        assert (await client.post("session_heartbeat", json={"session_id": session})).status_code == 410


async def test_a_session_of_somebody_else_is_not_found(place: Place, bus: Bus) -> None:
    await add_key(bus)
    await add_key(bus, OTHER_KEY, tenant="other")
    async with place.gateway() as gateway, http(gateway.port) as mine, http(gateway.port, OTHER_KEY) as theirs:
        session = await new_session(mine)
        assert (await theirs.post("session_heartbeat", json={"session_id": session})).status_code == 404


async def test_a_key_works_once_it_is_made_and_not_after_it_is_revoked(place: Place, bus: Bus) -> None:
    async with place.gateway() as gateway, http(gateway.port) as client, http(gateway.port, None) as nobody:
        assert (await nobody.get("get_server_capabilities")).status_code == 401
        assert (await client.get("get_server_capabilities")).status_code == 401

        async def status_is(expected: int) -> bool | None:
            return (await client.get("get_server_capabilities")).status_code == expected or None

        await add_key(bus, KEY)
        await eventually(lambda: status_is(200))
        await add_key(bus, KEY, revoked=1.0)
        await eventually(lambda: status_is(401))
