"""What a RestClient looks up and changes, of what really was trained, saved and sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import tinker
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as perfetto
from tinker import types
from tinker.types import SessionSearchRequest

from tests.mesh.harness import MODEL
from tests.mesh.sdk.data import CLOSE, fetched, learn, loss, scores
from tests.mesh.sdk.declared import DEPRECATED_TOO, differs, means
from tests.mesh.sdk.world import SECONDS, User, World, wait

pytestmark = DEPRECATED_TOO


@pytest.fixture
def other(world: World) -> Iterator[User]:
    with world.user() as found:
        yield found


class Trained:
    """A run with one of each checkpoint, and a sampler."""

    def __init__(self, user: User) -> None:
        self.training = user.train()
        learn(self.training)
        self.run = self.training.model_id
        self.session = self.run.split(":")[0]
        self.state = self.training.save_state("state").result().path
        self.sampled = self.training.save_weights_for_sampler("sampled").result().path
        self.files = self.training.save_weights_external("files").result().path
        self.sampler = self.training.create_sampling_client(self.sampled).result(SECONDS)
        self.loss = loss(self.training)


@pytest.fixture
def trained(user: User) -> Trained:
    return Trained(user)


@means(
    "the runs of the caller, newest first and in pages, each with its base model, rank and last checkpoints; by id, "
    "by a checkpoint's path, by project; another's run is not found",
    "RestClient.list_training_runs",
    "RestClient.list_training_runs_async",
    "RestClient.get_training_run",
    "RestClient.get_training_run_async",
    "RestClient.get_training_run_by_tinker_path",
    "RestClient.get_training_run_by_tinker_path_async",
)
def test_runs_are_found(user: User, other: User, trained: Trained) -> None:
    rest, second = user.rest, user.train(rank=4).model_id
    found = rest.list_training_runs().result()
    assert [each.training_run_id for each in found.training_runs] == [second, trained.run]
    assert found.cursor is not None
    assert found.cursor.total_count == 2
    first = rest.get_training_run(trained.run).result()
    assert (first.base_model, first.is_lora, first.lora_rank) == (MODEL, True, 8)
    assert first.last_checkpoint is not None
    assert first.last_sampler_checkpoint is not None
    assert first.last_checkpoint.tinker_path == trained.state
    assert first.last_sampler_checkpoint.tinker_path == trained.sampled
    assert wait(rest.get_training_run_async(trained.run)).training_run_id == trained.run
    assert rest.get_training_run_by_tinker_path(trained.files).result().training_run_id == trained.run
    assert wait(rest.get_training_run_by_tinker_path_async(trained.state)).training_run_id == trained.run
    page = wait(rest.list_training_runs_async(limit=1, offset=1))
    assert [each.training_run_id for each in page.training_runs] == [trained.run]
    assert rest.list_training_runs(project_id="empty").result().training_runs == []
    assert other.rest.list_training_runs().result().training_runs == []
    with pytest.raises(tinker.NotFoundError):
        other.rest.get_training_run(trained.run).result()


@means(
    "those of a run, and all of the caller, newest first, with kind, size and path",
    "RestClient.list_checkpoints",
    "RestClient.list_checkpoints_async",
    "RestClient.list_user_checkpoints",
    "RestClient.list_user_checkpoints_async",
)
def test_checkpoints_are_listed(user: User, other: User, trained: Trained) -> None:
    rest = user.rest
    found = rest.list_checkpoints(trained.run).result().checkpoints
    assert [(each.checkpoint_type, each.tinker_path) for each in found] == [
        ("external", trained.files),
        ("sampler", trained.sampled),
        ("training", trained.state),
    ]
    assert all(each.size_bytes and not each.public and each.expires_at is None for each in found)
    assert wait(rest.list_checkpoints_async(trained.run)).checkpoints == found
    assert rest.list_user_checkpoints().result().checkpoints == found
    assert wait(rest.list_user_checkpoints_async(limit=1, offset=1)).checkpoints == found[1:2]
    assert other.rest.list_user_checkpoints().result().checkpoints == []


@means(
    "what is deleted cannot be loaded or sampled any more,; the other checkpoints stay",
    "RestClient.delete_checkpoint",
    "RestClient.delete_checkpoint_async",
    "RestClient.delete_checkpoint_from_tinker_path",
    "RestClient.delete_checkpoint_from_tinker_path_async",
)
def test_deleted_checkpoints_are_gone(user: User, other: User, trained: Trained) -> None:
    rest = user.rest
    more = [trained.training.save_state(name) for name in ("b", "c")]
    with pytest.raises(tinker.NotFoundError):
        other.rest.delete_checkpoint(trained.run, "weights/state").result()
    rest.delete_checkpoint(trained.run, "weights/state").result()
    wait(rest.delete_checkpoint_async(trained.run, "sampler_weights/sampled"))
    rest.delete_checkpoint_from_tinker_path(more[0].result().path).result()
    wait(rest.delete_checkpoint_from_tinker_path_async(trained.files))
    left = [each.tinker_path for each in rest.list_user_checkpoints().result().checkpoints]
    assert left == [more[1].result().path]
    with pytest.raises(tinker.NotFoundError):
        user.service.create_training_client_from_state(trained.state).result(SECONDS)
    with pytest.raises(tinker.NotFoundError):
        user.service.create_sampling_client(model_path=trained.sampled).result(SECONDS)
    again = user.service.create_training_client_from_state(left[0]).result(SECONDS)
    assert loss(again) == pytest.approx(trained.loss, abs=CLOSE)


@means(
    "others may load and sample what is public, and nothing else of the run; once it is not, they cannot",
    "RestClient.publish_checkpoint_from_tinker_path",
    "RestClient.publish_checkpoint_from_tinker_path_async",
    "RestClient.unpublish_checkpoint_from_tinker_path",
    "RestClient.unpublish_checkpoint_from_tinker_path_async",
)
def test_public_checkpoints_are_for_everybody(user: User, other: User, trained: Trained) -> None:
    rest = user.rest
    ways: tuple[Callable[[str], Any], ...] = (
        lambda path: rest.publish_checkpoint_from_tinker_path(path).result(),
        lambda path: wait(rest.publish_checkpoint_from_tinker_path_async(path)),
    )
    for publish in ways:
        with pytest.raises(tinker.NotFoundError):
            other.service.create_training_client_from_state(trained.state).result(SECONDS)
        publish(trained.state)
        theirs = other.service.create_training_client_from_state(trained.state).result(SECONDS)
        assert loss(theirs) == pytest.approx(trained.loss, abs=CLOSE)
        with pytest.raises(tinker.NotFoundError):
            other.service.create_sampling_client(model_path=trained.sampled).result(SECONDS)
        wait(rest.unpublish_checkpoint_from_tinker_path_async(trained.state))
    rest.publish_checkpoint_from_tinker_path(trained.sampled).result()
    sampler = other.service.create_sampling_client(model_path=trained.sampled).result(SECONDS)
    assert scores(sampler) == pytest.approx(scores(trained.sampler), abs=CLOSE)
    rest.unpublish_checkpoint_from_tinker_path(trained.sampled).result()
    with pytest.raises(tinker.NotFoundError):
        other.service.create_sampling_client(model_path=trained.sampled).result(SECONDS)


@means(
    "from now on within an hour to ten years, removed with None; anything else is refused",
    "RestClient.set_checkpoint_ttl_from_tinker_path",
    "RestClient.set_checkpoint_ttl_from_tinker_path_async",
)
def test_checkpoints_live_as_long_as_they_are_told(user: User, trained: Trained) -> None:
    def expires() -> datetime | None:
        return next(
            each.expires_at
            for each in user.rest.list_user_checkpoints().result().checkpoints
            if each.tinker_path == trained.state
        )

    user.rest.set_checkpoint_ttl_from_tinker_path(trained.state, 3600).result()
    at = expires()
    assert at is not None
    assert at.timestamp() == pytest.approx(time.time() + 3600, abs=60)
    wait(user.rest.set_checkpoint_ttl_from_tinker_path_async(trained.state, None))
    assert expires() is None
    with pytest.raises(tinker.BadRequestError, match="3600"):
        user.rest.set_checkpoint_ttl_from_tinker_path(trained.state, 5).result()


@means(
    "base model, rank and trained layers, also of another's checkpoint that is public",
    "RestClient.get_weights_info_by_tinker_path",
)
def test_weights_are_described(user: User, other: User, trained: Trained) -> None:
    info = user.rest.get_weights_info_by_tinker_path(trained.state).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL, True, 8)
    assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, True, True)
    with pytest.raises(tinker.NotFoundError):
        other.rest.get_weights_info_by_tinker_path(trained.state).result()
    user.rest.publish_checkpoint_from_tinker_path(trained.state).result()
    assert other.rest.get_weights_info_by_tinker_path(trained.state).result() == info


@means(
    "the same weights under a new path, in the project that was named; somebody else's with a key of the owner as "
    "`weights_access_token`, which can be loaded with as well",
    "RestClient.copy_weights",
    "RestClient.copy_weights_async",
)
def test_checkpoints_are_copied_within_and_between_owners(user: User, other: User, trained: Trained) -> None:
    own = user.rest.copy_weights(trained.state, "archive").result()
    with pytest.raises(tinker.NotFoundError):
        other.rest.copy_weights(trained.state, "theirs").result()
    theirs = wait(other.rest.copy_weights_async(trained.state, "theirs", weights_access_token=user.key))
    for who, path in ((user, own), (other, theirs)):
        again = who.service.create_training_client_from_state_with_optimizer(path).result(SECONDS)
        assert loss(again) == pytest.approx(trained.loss, abs=CLOSE)
    direct = other.service.create_training_client_from_state(trained.state, weights_access_token=user.key)
    assert loss(direct.result(SECONDS)) == pytest.approx(trained.loss, abs=CLOSE)


@means(
    "a link to each file, good for a while and without a key; the files are those of the adapter",
    "RestClient.get_external_weights_urls",
    "RestClient.get_external_weights_urls_async",
)
def test_files_are_behind_links(user: User, other: User, trained: Trained) -> None:
    found = user.rest.get_external_weights_urls(trained.files).result()
    files = fetched(found.urls)
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert b'"r": 8' in files["adapter_config.json"]
    assert found.expires > datetime.now(UTC)
    assert fetched(wait(user.rest.get_external_weights_urls_async(trained.files)).urls) == files
    with pytest.raises(tinker.NotFoundError):
        other.rest.get_external_weights_urls(trained.files).result()


@means(
    "a session's runs and samplers; a sampler's model and path; the caller's sessions, newest first",
    "RestClient.get_session",
    "RestClient.get_session_async",
    "RestClient.list_sessions",
    "RestClient.list_sessions_async",
    "RestClient.get_sampler",
    "RestClient.get_sampler_async",
)
def test_sessions_and_samplers_are_found(user: User, other: User, trained: Trained) -> None:
    rest, sampler = user.rest, trained.sampler._sampling_session_id
    about = rest.get_session(trained.session).result()
    assert (about.training_run_ids, about.sampler_ids) == ([trained.run], [sampler])
    assert wait(rest.get_session_async(trained.session)) == about
    found = rest.get_sampler(sampler).result()
    assert (found.sampler_id, found.base_model, found.model_path) == (sampler, MODEL, trained.sampled)
    assert wait(rest.get_sampler_async(sampler)) == found
    newer = user.another().holder.get_session_id()
    assert rest.list_sessions().result().sessions == [newer, trained.session]
    assert wait(rest.list_sessions_async(limit=1, offset=1)).sessions == [trained.session]
    for look in (lambda: other.rest.get_session(trained.session), lambda: other.rest.get_sampler(sampler)):
        with pytest.raises(tinker.NotFoundError):
            look().result()


@means(
    "by name, project and metadata, with what each has stored; a session moves to another project with its runs",
    "RestClient.search_sessions",
    "RestClient.assign_session_project",
    "RestClient.assign_session_project_async",
)
@differs(
    "states of sessions",
    "`active` and `client_finished` only: a failed request fails alone, nothing else ends a session but silence, "
    "which is no state",
)
def test_sessions_are_searched_and_moved(user: User, trained: Trained) -> None:
    rest = user.rest
    service = user.another(display_name="Nightly run", project_id="p", user_metadata={"team": "a"})
    named = service.holder.get_session_id()
    found = rest.search_sessions(SessionSearchRequest(display_name="nightly")).result().sessions
    assert [(each.session_id, each.project_id) for each in found] == [(named, "p")]
    tagged = rest.search_sessions(SessionSearchRequest(user_metadata={"team": "a"})).result().sessions
    assert [each.session_id for each in tagged] == [named]
    about = rest.search_sessions(SessionSearchRequest(session_id=trained.session)).result().sessions[0]
    assert about.checkpoints_count == 3
    assert about.checkpoint_storage_bytes
    rest.assign_session_project(trained.session, "p").result()
    wait(rest.assign_session_project_async(named, "q"))
    for project, session in (("p", trained.session), ("q", named)):
        inside = rest.search_sessions(SessionSearchRequest(project_ids=[project])).result().sessions
        assert [each.session_id for each in inside] == [session]
    runs = rest.list_training_runs(project_id="p").result().training_runs
    assert [each.training_run_id for each in runs] == [trained.run]


@means(
    "a Perfetto trace with what the session really did: operations of the run and samples",
    "RestClient.export_session_trace",
    "RestClient.export_session_trace_async",
)
def test_a_trace_has_what_was_done(user: User, trained: Trained) -> None:
    scores(trained.sampler)
    first = user.rest.export_session_trace(trained.session).result()
    for url in (first, wait(user.rest.export_session_trace_async(trained.session))):
        trace = perfetto.Trace.FromString(httpx.get(url, timeout=60).raise_for_status().content)
        begun = [packet.track_event.name for packet in trace.packet if packet.track_event.type == 1]
        assert begun.count("optim_step") == 3
        assert {"create", "forward_backward", "save_state", "save_policy", "save_external", "sample"} <= set(begun)


@means("who the caller is: tenant and organization", "RestClient.whoami")
@differs(
    "users and organizations",
    "a user is a tenant of the mesh, and all tenants are one organization; teams do not exist",
)
def test_the_caller_is_named(user: User) -> None:
    me = user.rest.whoami().result()
    assert (me.user_urn, me.org_urn) == (f"tml:organization_user:{user.tenant}", "tml:organization:openrl")


@means(
    "without a session: models with context lengths; events accepted",
    "RestClient.get_server_capabilities",
    "RestClient.get_telemetry",
)
def test_capabilities_and_telemetry_need_no_session(user: User) -> None:
    models = user.rest.get_server_capabilities().result().supported_models
    assert MODEL in [each.model_name for each in models]
    telemetry = user.rest.get_telemetry()
    assert telemetry is not None
    assert telemetry.log("something")


def until(look: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What `look` finds, as soon as it finds something: trainers and samplers tell what was used every few seconds."""
    give_up = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < give_up
        time.sleep(0.2)
    return found


def this_hour() -> tuple[datetime, datetime]:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return hour - timedelta(hours=1), hour + timedelta(hours=1)


@means(
    "tokens trained, read and sampled, checkpoints and storage, by the hour and session: exactly the tokens that "
    "were sent",
    "RestClient.get_billing_usage",
    "RestClient.get_billing_usage_async",
    "RestClient.get_current_checkpoint_storage_usage",
    "RestClient.get_current_checkpoint_storage_usage_async",
)
@differs(
    "costs", "nothing has a price: costs and rates are null; the prompt of several samples is read, and counted, once"
)
def test_usage_counts_what_was_used(user: User) -> None:
    training = user.train()
    learn(training, 2)
    path = training.save_state("one").result().path
    base = user.base()
    base.sample(types.ModelInput.from_ints([5, 6, 7]), 2, types.SamplingParams(max_tokens=4, stop=[])).result(SECONDS)

    def told(usage: types.BillingUsageResponse) -> dict[str, int]:
        counts: dict[str, int] = {}
        for each in usage.data:
            info = each.event_info
            counts[info.type] = counts.get(info.type, 0) + int(getattr(info, "token_count", None) or 0)
        return counts

    kinds = {"training", "sampling_prefill", "sampling_sample"}
    begin, end = this_hour()

    def usage() -> dict[str, int] | None:
        counts = told(user.rest.get_billing_usage(begin, end).result())
        complete = {"training": 10, "sampling_sample": 8}
        return counts if all(counts.get(kind, 0) >= least for kind, least in complete.items()) else None

    counts = until(usage)
    assert {kind: counts[kind] for kind in kinds} == {"training": 10, "sampling_prefill": 3, "sampling_sample": 8}
    assert told(wait(user.rest.get_billing_usage_async(begin, end))) == counts
    assert all(each.estimated_cost_usd is None for each in user.rest.get_billing_usage(begin, end).result().data)
    storage = user.rest.get_current_checkpoint_storage_usage().result().data
    size = next(
        each.size_bytes for each in user.rest.list_user_checkpoints().result().checkpoints if each.tinker_path == path
    )
    assert [(each.project_id, each.checkpoint_count, each.size_bytes) for each in storage] == [("default", 1, size)]
    assert wait(user.rest.get_current_checkpoint_storage_usage_async("elsewhere")).data == []


@means(
    "what the caller did with checkpoints and projects, in order, by kind and by day",
    "RestClient.get_audit_log",
    "RestClient.get_audit_log_async",
)
def test_the_audit_log_tells_what_was_done(user: User, other: User, trained: Trained) -> None:
    user.rest.publish_checkpoint_from_tinker_path(trained.state).result()
    user.rest.assign_session_project(trained.session, "p").result()
    user.rest.delete_checkpoint_from_tinker_path(trained.state).result()
    events = [each.event for each in user.rest.get_audit_log("checkpoints").result().entries]
    assert events == ["checkpoint_read", "checkpoint_published", "checkpoint_deleted"]
    projects = wait(user.rest.get_audit_log_async("projects")).entries
    assert [each.event for each in projects] == ["project_session_assigned"]
    assert user.rest.get_audit_log(day=datetime(2025, 1, 1, tzinfo=UTC).date()).result().entries == []
    assert [each.event for each in other.rest.get_audit_log("checkpoints").result().entries] == []
