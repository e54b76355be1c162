"""What nobody should send to look-ups: each gets a clear 4xx, and the next request finds the gateway well."""

from __future__ import annotations

from typing import Any

import pytest

from shared.bus import Bus
from tests.mesh.gateway_records import NOW, Records
from tests.mesh.gateways import add_key, http
from tests.mesh.harness import Place

RUN = "s-1:train:0"
ONE = f"training_runs/{RUN}/checkpoints/weights/a"
COPY = {"source_path": f"tinker://{RUN}/weights/a"}

CASES: list[tuple[str, str, dict[str, Any] | bytes | None, int]] = [
    ("GET", "training_runs?limit=-1", None, 400),
    ("GET", "training_runs?limit=10001", None, 400),
    ("GET", "training_runs?offset=x", None, 400),
    ("GET", "training_runs?access_scope=mine", None, 400),
    ("GET", "training_runs/never", None, 404),
    ("GET", "training_runs/..%2f..%2fetc", None, 404),
    ("GET", f"training_runs/{'x' * 5000}", None, 404),
    ("GET", "training_runs/%00", None, 404),
    ("GET", f"training_runs/{RUN}/checkpoints/weights/a/external_weights_urls", None, 400),
    ("GET", f"training_runs/{RUN}/checkpoints/models/a/external_weights_urls", None, 400),
    ("PUT", f"{ONE}/ttl", {}, 400),
    ("PUT", f"{ONE}/ttl", {"ttl_seconds": "3600"}, 400),
    ("PUT", f"{ONE}/ttl", {"ttl_seconds": True}, 400),
    ("PUT", f"{ONE}/ttl", {"ttl_seconds": 1e30}, 400),
    ("PUT", f"{ONE}/ttl", {"ttl_seconds": 3600, "more": 1}, 400),
    ("PUT", f"{ONE}/ttl", b"{", 400),
    ("PUT", f"{ONE}/ttl", b"\xff", 400),
    ("DELETE", f"training_runs/{RUN}/checkpoints/weights/.hidden", None, 400),
    ("DELETE", f"training_runs/{RUN}/checkpoints/weights/%2e%2e", None, 400),
    ("DELETE", f"training_runs/{RUN}/checkpoints/state/a", None, 400),
    ("DELETE", f"training_runs/{RUN}/checkpoints/weights/b", None, 404),
    ("POST", "weights_info", {"tinker_path": "tinker://a/b"}, 400),
    ("POST", "weights_info", {"tinker_path": f"tinker://{RUN}/weights/../a"}, 400),
    ("POST", "weights_info", {"tinker_path": f"tinker://{'r' * 300}/weights/a"}, 400),
    ("POST", "weights_info", {"tinker_path": "/etc/passwd"}, 400),
    ("POST", "weights_info", {"tinker_path": 5}, 400),
    ("POST", "weights_info", {}, 400),
    ("POST", "copy_weights", COPY, 400),
    ("POST", "copy_weights", {**COPY, "destination_project_id": ""}, 400),
    ("POST", "copy_weights", {**COPY, "session_id": "s-1"}, 400),
    ("POST", "copy_weights", {**COPY, "session_id": "s-9", "model_seq_id": 0}, 404),
    ("POST", "copy_weights", {**COPY, "session_id": "s-1", "model_seq_id": -1}, 400),
    ("POST", "copy_weights", {**COPY, "session_id": "s-1", "model_seq_id": 0}, 400),
    ("POST", "copy_weights", {**COPY, "destination_project_id": "p", "ttl_seconds": 5}, 400),
    ("GET", "samplers/s-1:sample:9", None, 404),
    ("GET", "samplers/s-1", None, 404),
    ("GET", "sessions/s-9", None, 404),
    ("PUT", "sessions/s-1/project", {}, 400),
    ("PUT", "sessions/s-1/project", {"project_id": ""}, 400),
    ("PUT", "sessions/s-1/project", {"project_id": "x" * 1000}, 400),
    ("POST", "sessions/search", {"limit": 0}, 400),
    ("POST", "sessions/search", {"owner": {"type": "me"}}, 400),
    ("POST", "sessions/search", {"cursor": {"last_created_at": "now", "last_session_id": "x"}}, 400),
    ("GET", "sessions/s-9/trace_export", None, 404),
    ("GET", "audit?day=yesterday", None, 400),
    ("GET", "audit?event_type=keys", None, 400),
    ("GET", "billing/usage/events", None, 400),
    ("GET", "billing/usage/events?starting_on=2026-07-13T00:00:00Z&ending_before=2026-09-13T00:00:00Z", None, 400),
    ("GET", "billing/usage/events?starting_on=2999-07-13T00:00:00Z&ending_before=2999-07-14T00:00:00Z", None, 400),
    ("GET", "billing/usage/events?starting_on=0001-01-01T00:00:00Z&ending_before=0001-01-02T00:00:00Z", None, 200),
    ("GET", f"downloads/{RUN}/weights/a/state", None, 403),
    ("GET", f"downloads/{RUN}/weights/a/x?expires=9&signature=%ff", None, 403),
    ("GET", f"downloads/{RUN}/weights/a/x?expires=99999999999&signature={'0' * 64}", None, 403),
    ("GET", "traces/s-1.pftrace", None, 403),
    ("GET", "auth/token", None, 405),
]


async def test_what_cannot_be_answered_is_refused_in_words(place: Place, bus: Bus) -> None:
    await add_key(bus)
    records = Records(bus)
    await records.checkpoint(await records.run(await records.session("s-1", NOW), 0, NOW), "training", "a", NOW)
    async with place.gateway() as gateway, http(gateway.port) as client:
        wrong = []
        for method, path, body, status in CASES:
            answer = await client.request(method, path, **_sent(body))
            if answer.status_code != status or (status >= 400 and not answer.json()["error"]):
                wrong.append((method, path, body, status, answer.status_code, answer.text[:200]))
        assert wrong == []
        assert (await client.get("training_runs")).json()["cursor"]["total_count"] == 1


@pytest.mark.parametrize("key", [None, "", "tml-nobody", "eyJhbGciOiJub25lIn0.e30.", "eyJ"])
async def test_without_a_good_key_nothing_is_told(place: Place, bus: Bus, key: str | None) -> None:
    await add_key(bus)
    async with place.gateway() as gateway, http(gateway.port, key) as client:
        for path in ("training_runs", "checkpoints", "sessions", "audit", "auth/apikey/me", "samplers/x"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["category"]) == (401, "user"), path


def _sent(body: dict[str, Any] | bytes | None) -> dict[str, Any]:
    if body is None:
        return {}
    return {"content": body} if isinstance(body, bytes) else {"json": body}
