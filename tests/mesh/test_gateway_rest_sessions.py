"""Sessions, identity, usage and the audit log, as the real client's RestClient and AdminClient look them up."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
import tinker
from tinker import AdminClient, RestClient
from tinker.types import AccessibleSearchOwner, SessionSearchRequest

from shared import topology
from shared.bus import Bus
from shared.contracts.policies import PolicyRef
from shared.contracts.sessions import Heartbeat, SamplerRecord
from shared.contracts.tenants import UsageRecorded
from tests.mesh.gateway_records import ADMIN_KEY, NOW, Records, admin, ask, client
from tests.mesh.gateways import KEY, OTHER_KEY, add_key
from tests.mesh.harness import MODEL, eventually

pytestmark = [
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
    pytest.mark.filterwarnings("ignore::tinker.lib.experimental.ExperimentalWarning"),
]


async def test_samplers_and_sessions_are_looked_up(gateway: str, records: Records) -> None:
    session = await records.session("s-1", NOW - 9, display_name="one", user_metadata={"a": "b", "n": 1}, project="p")
    await records.session("s-2", NOW - 8)
    await records.session("s-3", NOW - 7, owner="other")
    run = await records.run(session, 0, NOW)
    path = f"tinker://{run}/sampler_weights/x"
    samplers = [
        SamplerRecord(
            sampler="s-1:sample:0", session="s-1", owner="default", base_model=MODEL, path=path,
            policy=PolicyRef(run=run, version=3), created=NOW,
        ),
        SamplerRecord(sampler="s-1:sample:1", session="s-1", owner="default", base_model=MODEL, created=NOW + 1),
    ]  # fmt: skip
    for sampler in samplers:
        await records.bus.table(topology.SAMPLERS).put(sampler.sampler, sampler)
    mine, theirs = await client(gateway), await client(gateway, OTHER_KEY)

    found = await ask(lambda: mine.get_sampler("s-1:sample:0"))
    assert (found.sampler_id, found.base_model, found.model_path) == ("s-1:sample:0", MODEL, path)
    assert (await mine.get_sampler_async("s-1:sample:1")).model_path is None
    about = await ask(lambda: mine.get_session("s-1"))
    assert (about.training_run_ids, about.sampler_ids) == ([run], ["s-1:sample:0", "s-1:sample:1"])
    assert (about.display_name, about.user_metadata) == ("one", {"a": "b", "n": "1"})
    assert (await mine.get_session_async("s-1")) == about
    assert (await ask(mine.list_sessions)).sessions == ["s-2", "s-1"]
    assert (await mine.list_sessions_async(limit=1, offset=1)).sessions == ["s-1"]
    for look in (lambda: theirs.get_sampler("s-1:sample:0"), lambda: theirs.get_session("s-1")):
        with pytest.raises(tinker.NotFoundError):
            await ask(look)
    assert (await ask(lambda: theirs.list_sessions(access_scope="accessible"))).sessions == ["s-3"]
    boss = await client(gateway, ADMIN_KEY)
    assert (await ask(lambda: boss.list_sessions(access_scope="accessible"))).sessions == ["s-3", "s-2", "s-1"]


async def test_sessions_are_searched_and_moved(gateway: str, records: Records) -> None:
    for number in range(5):
        await records.session(f"s-{number}", NOW + number, display_name=f"nightly {number}")
    await records.session("s-other", NOW + 9, owner="other", display_name="nightly")
    await records.bus.table(topology.HEARTBEATS).put("s-0", Heartbeat(at=time.time()))
    await records.session("s-done", NOW + 10, ended="errored", end_detail="boom", ended_at=NOW + 11)
    run = await records.run("s-0", 0, NOW)
    await records.checkpoint(run, "training", "a", NOW)
    rest, theirs = await client(gateway), await client(gateway, OTHER_KEY)

    request = SessionSearchRequest(display_name="NIGHT", owner=AccessibleSearchOwner(), limit=2)
    pages = []
    while True:
        page = await ask(partial(rest.search_sessions, request))
        pages.append([each.session_id for each in page.sessions])
        if page.next_cursor is None:
            break
        request = request.model_copy(update={"cursor": page.next_cursor})
    assert pages == [["s-4", "s-3"], ["s-2", "s-1"], ["s-0"]]
    active = page.sessions[0]
    assert (active.status.type, active.checkpoints_count, active.checkpoint_storage_bytes) == ("active", 1, 5)
    assert (active.owner, active.project_id) == ("tml:organization_user:default", "default")
    done = (await ask(lambda: rest.search_sessions(SessionSearchRequest(session_id="s-done")))).sessions[0]
    assert (done.status.type, done.status.reason.type, done.status.detail) == ("client_finished", "errored", "boom")
    silent = (await ask(lambda: rest.search_sessions(SessionSearchRequest(session_id="s-1")))).sessions[0]
    assert silent.status is None

    await ask(lambda: rest.assign_session_project("s-0", "p"))
    await rest.assign_session_project_async("s-1", "p")
    inside = await ask(lambda: rest.search_sessions(SessionSearchRequest(project_ids=["p"])))
    assert [each.session_id for each in inside.sessions] == ["s-1", "s-0"]
    with pytest.raises(tinker.NotFoundError):
        await ask(lambda: theirs.assign_session_project("s-0", "q"))
    with pytest.raises(tinker.BadRequestError):
        await ask(lambda: theirs.search_sessions(SessionSearchRequest(project_ids=["p"])))


async def test_who_the_caller_is_and_that_a_token_ends_with_its_key(gateway: str, records: Records, bus: Bus) -> None:
    rest = await client(gateway)
    me = await ask(rest.whoami)
    assert (me.user_urn, me.org_urn) == ("tml:organization_user:default", "tml:organization:openrl")
    assert (await ask(rest.get_server_capabilities)).supported_models == []
    assert rest.get_telemetry() is (await admin(gateway, KEY)).get_telemetry()
    token = await rest.holder.get_identity_jwt()
    assert token is not None
    with_token = await client(gateway, token)
    assert (await ask(with_token.list_sessions)).sessions == []
    await add_key(bus, revoked=time.time())

    async def is_refused() -> bool | None:
        try:
            await ask(with_token.list_sessions)
        except tinker.AuthenticationError:
            return True
        return None

    await eventually(is_refused)


async def test_usage_is_told_by_the_hour_to_its_owner_and_to_administrators(gateway: str, records: Records) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    begin = hour.timestamp()
    session = await records.session("s-1", begin, project="p", user_metadata={"team": "a"})
    run = await records.run(session, 0, begin)
    await records.checkpoint(run, "training", "a", begin)
    for owner, kind, tokens, cached in (
        ("default", "training", 100, False),
        ("default", "prompt", 30, True),
        ("default", "sampled", 7, False),
        ("default", "sampled", 3, False),
        ("other", "sampled", 1000, False),
    ):
        used = UsageRecorded(
            owner=owner, kind=kind, tokens=tokens, begin=begin, end=begin + 5, base_model=MODEL,  # type: ignore[arg-type]
            session=session if owner == "default" else "", cached=cached,
        )  # fmt: skip
        await records.bus.publish(topology.USED, used, owner=owner)
    own, boss = await admin(gateway, KEY), await admin(gateway)

    usage = await ask(lambda: own.get_billing_usage(hour, hour + timedelta(hours=1)))
    told = [(each.event_info.type, getattr(each.event_info, "token_count", None)) for each in usage.data]
    kinds = [("training", 100), ("sampling_prefill", 30), ("sampling_sample", 10), ("checkpoint", None)]
    assert told == [*kinds, ("storage", None)]
    training, prompt, _, checkpoint, storage = usage.data
    assert (training.bucket_start, training.bucket_end) == (hour, hour + timedelta(hours=1))
    assert (training.session_id, training.project_id, training.base_model) == (session, "p", MODEL)
    assert (training.user_id, training.estimated_cost_usd) == ("tml:organization_user:default", None)
    assert (prompt.event_info.cached, checkpoint.event_info.count) == (True, 1)
    assert (storage.session_id, storage.project_id) == (None, "p")
    assert storage.event_info.gigabyte_hours == pytest.approx(5e-9 * (time.time() - begin) / 3600, rel=0.2)
    assert usage.sessions[session].user_metadata == {"team": "a"}
    everybody = await boss.get_billing_usage_async(hour, hour + timedelta(hours=1))
    assert {each.user_name for each in everybody.data} == {"default", "other"}
    assert getattr(everybody.data[0].event_info, "token_count", None) == 1000
    with pytest.raises(tinker.BadRequestError, match="beginning of a UTC hour"):
        await ask(lambda: own.get_billing_usage(hour + timedelta(minutes=1), hour + timedelta(hours=1)))

    rest = await client(gateway)
    assert (await ask(lambda: rest.get_billing_usage(hour, hour + timedelta(hours=1)))).sessions == usage.sessions
    assert (await rest.get_billing_usage_async(hour, hour + timedelta(hours=1))).sessions == usage.sessions


async def test_storage_is_told_by_project_and_owner(gateway: str, records: Records) -> None:
    run = await records.run(await records.session("s-1", NOW, project="p"), 0, NOW)
    await records.checkpoint(run, "training", "a", NOW)
    await records.checkpoint(run, "external", "b", NOW, files={"adapter_config.json": b"{}"})
    loose = await records.run(await records.session("s-2", NOW, owner="other"), 0, NOW, owner="other")
    await records.checkpoint(loose, "training", "a", NOW, owner="other")
    own, boss, rest = await admin(gateway, KEY), await admin(gateway), await client(gateway)

    found = (await ask(own.get_current_checkpoint_storage_usage)).data
    assert [(each.project_id, each.checkpoint_count, each.size_bytes) for each in found] == [("p", 2, 7)]
    assert (found[0].user_name, found[0].estimated_monthly_cost_usd) == ("default", None)
    everybody = (await boss.get_current_checkpoint_storage_usage_async()).data
    assert [(each.project_id, each.user_name) for each in everybody] == [("default", "other"), ("p", "default")]
    assert (await ask(lambda: boss.get_current_checkpoint_storage_usage("p"))).data == found
    assert (await ask(lambda: rest.get_current_checkpoint_storage_usage("q"))).data == []
    assert (await rest.get_current_checkpoint_storage_usage_async("p")).data == found


async def test_what_was_done_stands_in_the_audit_log(gateway: str, records: Records) -> None:
    run = await records.run(await records.session("s-1", NOW), 0, NOW)
    path = await records.checkpoint(run, "training", "a", NOW)
    rest, own, boss = await client(gateway), await admin(gateway, KEY), await admin(gateway)
    await ask(lambda: rest.get_weights_info_by_tinker_path(path))
    await ask(lambda: rest.publish_checkpoint_from_tinker_path(path))
    await ask(lambda: rest.set_checkpoint_ttl_from_tinker_path(path, 3600))
    await ask(lambda: rest.assign_session_project("s-1", "p"))
    copied = await ask(lambda: rest.copy_weights(path, "p"))
    await ask(lambda: rest.delete_checkpoint_from_tinker_path(path))

    entries = (await ask(own.get_audit_log)).entries
    assert [entry.event for entry in entries] == [
        "checkpoint_read", "checkpoint_published", "checkpoint_ttl_set", "project_session_assigned",
        "checkpoint_read", "checkpoint_copied", "checkpoint_deleted",
    ]  # fmt: skip
    read, published = entries[:2]
    assert (read.model_id, read.tinker_path, read.purpose) == (run, path, "weights_info")
    assert published.event_details["key"] == "key-of-default"
    assert entries[5].event_details == {
        **entries[5].event_details, "source": path, "tinker_path": copied, "tenant": "default"
    }  # fmt: skip
    assert entries == sorted(entries, key=lambda entry: entry.timestamp)
    projects = await own.get_audit_log_async("projects")
    assert [entry.event for entry in projects.entries] == ["project_session_assigned"]
    assert (await ask(lambda: own.get_audit_log(day=datetime(2025, 1, 15, tzinfo=UTC).date()))).entries == []
    assert len((await ask(boss.get_audit_log)).entries) == 7
    other = await admin(gateway, OTHER_KEY)
    assert (await ask(other.get_audit_log)).entries == []
    assert len((await ask(rest.get_audit_log)).entries) == 7
    assert len((await rest.get_audit_log_async("teams")).entries) == 0


def test_every_method_of_both_clients_is_called_here() -> None:
    from pathlib import Path

    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_gateway_rest*.py"))
    methods = {name for kind in (RestClient, AdminClient) for name in dir(kind) if not name.startswith("_")}
    assert not [name for name in sorted(methods) if f".{name}(" not in text and f".{name})" not in text]
