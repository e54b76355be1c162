"""The flags that a client is given."""

from __future__ import annotations

import httpx
from tinker.types import ClientConfigResponse

from services.gateway.endpoints.sampling import MOST_SAMPLES
from services.gateway.endpoints.weights import LEAST_TTL, MOST_TTL
from shared.contracts.policies import MAX_RANK
from shared.contracts.sampling import MAX_WIDTH
from tests.mesh.sdk.declared import DEPRECATED_TOO
from tests.mesh.sdk.flags import DYNAMIC, FLAGS, LIMITS
from tests.mesh.sdk.world import User

pytestmark = DEPRECATED_TOO


def test_clients_are_given_the_flags_that_the_page_tells(user: User) -> None:
    url, headers = f"{user.world.url}/api/v1/client", {"X-API-Key": user.key}
    body = {"sdk_version": "test"}
    config = httpx.post(f"{url}/config", headers=headers, json=body).json()
    assert config == {name: value for name, (value, _) in FLAGS.items()}
    dynamic = httpx.post(f"{url}/dynamic_config", headers=headers, json=body).json()
    assert dynamic == {name: value for name, (value, _) in DYNAMIC.items()}


def test_every_flag_is_one_that_clients_know(user: User) -> None:
    assert set(FLAGS) <= set(ClientConfigResponse.model_fields)
    given = user.service.holder.get_client_config()
    assert {name: getattr(given, name) for name in FLAGS} == {name: value for name, (value, _) in FLAGS.items()}


def test_limits_are_those_of_the_code() -> None:
    told = dict(LIMITS)
    assert str(MAX_RANK) in told["rank"]
    assert f"{LEAST_TTL:,}" in told["`ttl_seconds`"]
    assert f"{MOST_TTL:,}" in told["`ttl_seconds`"]
    assert f"{MOST_SAMPLES:,}" in told["samples of a request"]
    assert str(MAX_WIDTH) in told["top-k tables"]
