"""What a tenant may have in flight, and the ids that clients are given. Pure."""

from __future__ import annotations

import pytest

from services.gateway import ids
from services.gateway.errors import NotFound
from services.gateway.limits import InFlight
from shared import topology
from shared.contracts.tenants import TenantLimits

LIMITS = TenantLimits(requests=2, queued_tokens=100)


def test_a_tenant_has_room_until_a_limit_and_again_when_something_is_answered() -> None:
    load = InFlight()
    load.add("a", "team", 60)
    assert load.refusal("team", LIMITS, 40) is None
    assert "60 tokens" in (load.refusal("team", LIMITS, 41) or "")
    load.add("b", "team", 10)
    assert "2 requests" in (load.refusal("team", LIMITS, 0) or "")
    assert load.refusal("other", LIMITS, 100) is None
    load.remove("a")
    assert load.refusal("team", LIMITS, 90) is None
    load.remove("a")
    load.remove("never submitted")
    assert (load.load("team").requests, load.load("team").tokens) == (1, 10)


def test_a_request_counts_once_however_often_it_is_submitted() -> None:
    load = InFlight()
    for _ in range(3):
        load.add("a", "team", 60)
    load.remove("a")
    assert len(load) == 0
    assert load.load("team").requests == 0


def test_a_single_request_is_never_too_large() -> None:
    assert InFlight().refusal("team", LIMITS, 10**9) is None


def test_ids_of_requests_lead_back_to_what_they_are_of() -> None:
    run, sampler = ids.parse_run("s-abc:train:3"), ids.parse_sampler("s-abc:sample:4")
    for owned, seq in ((run, 0), (run, 7), (sampler, 10**18)):
        request = owned.request(seq)
        found = ids.parse_request(request)
        assert (found.session, found.id, found.seq) == ("s-abc", owned.id, seq)
        assert topology.is_plain_request(request), "its answer has a subject that anybody can subscribe to"


def test_sessions_have_ids_of_their_own() -> None:
    sessions = {ids.new_session() for _ in range(100)}
    assert len(sessions) == 100
    assert all(ids.check_session(session) == session for session in sessions)


@pytest.mark.parametrize(
    "text", ["", "s-1:sample:0", "s-1:train:", "s-1:train:00", "s-1:train:1 ", "s-1:train:1\n", "x:train:1"]
)
def test_what_is_no_run_is_not_found(text: str) -> None:
    with pytest.raises(NotFound):
        ids.parse_run(text)
