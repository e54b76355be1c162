"""What a ServiceClient makes: runs, samplers, copies; how it begins and ends a session."""

from __future__ import annotations

import logging
import time

import httpx
import pytest
import tinker
import torch
from tinker import types
from tinker.types.session_status import ClientSessionFinished

from shared import topology
from tests.mesh.harness import MODEL
from tests.mesh.sdk.data import CLOSE, OTHERS, TOKENS, Reference, datum, fetched, learn, loss, scores, tensors
from tests.mesh.sdk.declared import DEPRECATED_TOO, differs, means
from tests.mesh.sdk.world import SECONDS, User, wait

pytestmark = DEPRECATED_TOO


def adapter(user: User, training: tinker.TrainingClient, name: str = "files") -> dict[str, torch.Tensor]:
    path = training.save_weights_external(name).result().path
    files = fetched(user.rest.get_external_weights_urls(path).result().urls)
    return tensors(files["adapter_model.safetensors"])


@means(
    "a fresh adapter changes nothing: losses equal those of the base model in transformers; one seed gives one "
    "adapter, another seed another; only the chosen layers are in the adapter; rank and metadata are found again",
    "ServiceClient.create_lora_training_client",
    "ServiceClient.create_lora_training_client_async",
)
def test_a_run_begins_as_the_base_model_with_the_adapter_that_was_asked_for(user: User, model: Reference) -> None:
    create = user.service.create_lora_training_client
    one = create(MODEL, rank=4, seed=7, user_metadata={"purpose": "test"}).result(SECONDS)
    same = wait(user.service.create_lora_training_client_async(MODEL, rank=4, seed=7))
    other = create(MODEL, rank=4, seed=8, train_mlp=False, train_unembed=False).result(SECONDS)
    assert loss(one) == pytest.approx(-sum(model.scores(TOKENS)), abs=CLOSE)
    assert user.rest.get_training_run(one.model_id).result().user_metadata == {"purpose": "test"}
    files = [adapter(user, each) for each in (one, same, other)]
    name = next(name for name in files[0] if "q_proj.lora_A" in name)
    assert files[0][name].shape[0] == 4
    assert torch.equal(files[0][name], files[1][name])
    assert not torch.equal(files[0][name], files[2][name])
    assert all(not each.any() for name, each in files[0].items() if "lora_B" in name)
    assert any("mlp" in name for name in files[0])
    assert any("lm_head" in name for name in files[0])
    assert all("self_attn" in name for name in files[2])


@means(
    "base model: its log-probabilities are those of transformers; checkpoint: those of the weights when it was saved",
    "ServiceClient.create_sampling_client",
    "ServiceClient.create_sampling_client_async",
)
def test_a_sampler_is_of_the_base_model_or_of_a_checkpoint(user: User, model: Reference) -> None:
    plain = user.service.create_sampling_client(base_model=MODEL).result(SECONDS)
    assert scores(plain) == pytest.approx(model.scores(TOKENS), abs=CLOSE)
    training = user.train()
    learn(training)
    path = training.save_weights_for_sampler("learnt").result().path
    expected = loss(training)
    learn(training, tokens=OTHERS)
    sampler = wait(user.service.create_sampling_client_async(model_path=path))
    assert -sum(scores(sampler)) == pytest.approx(expected, abs=CLOSE)
    assert sampler.get_base_model() == MODEL


@means(
    "weights and optimizer come back: the losses of further steps are those of the run that went on without a break",
    "ServiceClient.create_training_client_from_state_with_optimizer",
    "ServiceClient.create_training_client_from_state_with_optimizer_async",
)
def test_a_run_from_a_state_with_its_optimizer_goes_on_identically(user: User) -> None:
    training = user.train()
    learn(training)
    state = training.save_state("middle").result().path
    again = user.service.create_training_client_from_state_with_optimizer(state).result(SECONDS)
    more = wait(user.service.create_training_client_from_state_with_optimizer_async(state))
    assert len({training.model_id, again.model_id, more.model_id}) == 3
    expected = learn(training, steps=4)
    assert learn(again, steps=4) == pytest.approx(expected, abs=CLOSE)
    assert learn(more, steps=4) == pytest.approx(expected, abs=CLOSE)


@means(
    "weights come back and the optimizer begins anew: the first step moves every weight by the learning rate, as "
    "only a first step of AdamW does",
    "ServiceClient.create_training_client_from_state",
    "ServiceClient.create_training_client_from_state_async",
)
def test_a_run_from_weights_alone_begins_with_a_new_optimizer(user: User) -> None:
    training = user.train()
    learn(training)
    state, expected = training.save_state("middle").result().path, loss(training)
    runs = [
        user.service.create_training_client_from_state(state).result(SECONDS),
        wait(user.service.create_training_client_from_state_async(state, user_metadata={"from": "middle"})),
        user.service.create_training_client_from_state_with_optimizer(state).result(SECONDS),
    ]
    assert [loss(run) for run in runs] == pytest.approx([expected] * 3, abs=CLOSE)
    assert user.rest.get_training_run(runs[1].model_id).result().user_metadata == {"from": "middle"}
    before = adapter(user, runs[0])
    moved = []
    for run in runs:
        learn(run, steps=1, tokens=OTHERS, rate=0.01)
        after = adapter(user, run, "after")
        moved.append(torch.cat([(after[name] - before[name]).abs().flatten() for name in before]))
    for fresh in moved[:2]:
        # Weights without any gradient stay; in a fresh AdamW all others move by the rate, whatever their gradient is.
        assert ((fresh - 0.01).abs() < 1e-4).float().mean() > 0.8
    assert ((moved[2] - 0.01).abs() < 1e-4).float().mean() < 0.2, "here the optimizer remembers"


@means(
    "a checkpoint with files of its own in the session's project: it loads after its source was deleted",
    "ServiceClient.copy_weights",
)
def test_a_copy_is_a_checkpoint_of_its_own_in_the_project_of_the_session(user: User) -> None:
    training = user.train()
    learn(training)
    state, expected = training.save_state("source").result().path, loss(training)
    there = user.another(project_id="archive")
    copied = there.copy_weights(state, ttl_seconds=7200).result(SECONDS)
    user.rest.delete_checkpoint_from_tinker_path(state).result()
    assert copied != state
    run = user.rest.get_training_run_by_tinker_path(copied).result().training_run_id
    inside = user.rest.list_training_runs(project_id="archive").result().training_runs
    assert run in [each.training_run_id for each in inside]
    again = there.create_training_client_from_state(copied).result(SECONDS)
    assert loss(again) == pytest.approx(expected, abs=CLOSE)


@means(
    "traced in the client and run there: the same loss, metrics and gradient as the built-in cross_entropy",
    "ServiceClient.create_custom_loss",
    "TrainingClient.forward_backward_custom",
)
@differs(
    "custom losses on the server",
    "the flag `custom_loss_server_side` is off: losses of `create_custom_loss` run in the client, with the same "
    "results. Who uploads one all the same gets a clear error",
)
def test_a_traced_loss_trains_like_the_built_in_one(user: User) -> None:
    def neg_ll(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        own = -(logprobs * weights).sum()
        return own, {"custom/neg_ll:sum": own}

    handle = user.service.create_custom_loss(neg_ll, {"logprobs": 1, "weights": 1}).result(SECONDS)
    own, built_in = user.train(), user.train()
    weights = [1.0, 0.5, 2.0, 0.0, -1.0]
    for _ in range(2):
        found = own.forward_backward_custom([datum(weights=weights)], handle).result()
        expected = built_in.forward_backward([datum(weights=weights)], "cross_entropy").result()
        assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], abs=CLOSE)
        assert found.metrics["custom/neg_ll:sum"] == pytest.approx(expected.metrics["loss:sum"], abs=CLOSE)
        for run in (own, built_in):
            run.optim_step(types.AdamParams(learning_rate=0.02)).result()
    assert loss(own) == pytest.approx(loss(built_in), abs=CLOSE)
    answer = httpx.post(
        f"{user.world.url}/api/v1/create_custom_loss", headers={"X-API-Key": user.key}, json={"anything": 1}
    )
    assert answer.status_code == 400
    assert "in the client" in answer.json()["error"]


@means(
    "the models that are served, each with its context length",
    "ServiceClient.get_server_capabilities",
    "ServiceClient.get_server_capabilities_async",
    "ServiceClient.create_rest_client",
)
def test_capabilities_name_the_models_that_are_served(user: User) -> None:
    found = user.service.get_server_capabilities()
    served = {each.model_name: each for each in found.supported_models}
    assert served[MODEL].max_context_length == 1024
    assert wait(user.service.get_server_capabilities_async()) == found
    assert user.service.create_rest_client().get_server_capabilities().result() == found


@means("the session is in its address", "ServiceClient.get_console_url", "TrainingClient.get_console_url")
@differs(
    "`get_console_url`",
    "the SDK builds it without asking the server, so it leads to the console of the hosted service. Look at sessions "
    "with `tinker session export-trace`, `tinker run list` and the dashboards instead",
)
def test_console_addresses_name_what_they_show(user: User) -> None:
    training = user.train()
    assert training.model_id.split(":")[0] in user.service.get_console_url()
    assert "/training_runs/" in training.get_console_url()


@means(
    "events are accepted, none is dropped: what was logged is drained",
    "ServiceClient.get_telemetry",
    "TrainingClient.get_telemetry",
    "SamplingClient.get_telemetry",
)
@differs("telemetry", "accepted and not kept: a self-hosted server has no use for it")
def test_telemetry_is_accepted(user: User, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "tinker")
    training, sampler = user.train(), user.base()
    telemetry = user.service.get_telemetry()
    assert telemetry is not None
    assert telemetry is training.get_telemetry() is sampler.get_telemetry()
    assert telemetry.log("something", {"n": 1})
    telemetry._trigger_flush()  # type: ignore[no-untyped-call]
    assert telemetry._wait_until_drained_sync()
    assert "telemetry" not in caplog.text.lower()


@means(
    "the session is finished with its reason and detail, heartbeats end, further requests are refused, its runs are "
    "closed; closing again changes nothing",
    "ServiceClient.close",
)
def test_closing_ends_the_session_for_good(user: User) -> None:
    client = user.another(display_name="closing")
    training = client.create_lora_training_client(MODEL, rank=4).result(SECONDS)
    session = training.model_id.split(":")[0]
    other = tinker.types.SessionSearchRequest(session_id=session)
    assert user.rest.search_sessions(other).result().sessions[0].status.type == "active"  # type: ignore[union-attr]
    client.close("errored", detail="out of patience").result(SECONDS)
    client.close("success").result(SECONDS)
    status = user.rest.search_sessions(other).result().sessions[0].status
    assert isinstance(status, ClientSessionFinished)
    assert (status.reason.type, status.detail) == ("errored", "out of patience")
    body = {"session_id": session, "type": "session_heartbeat"}
    headers = {"X-API-Key": user.key}
    assert httpx.post(f"{user.world.url}/api/v1/session_heartbeat", headers=headers, json=body).status_code == 410
    with pytest.raises(RuntimeError, match="closed"):
        client.create_sampling_client(base_model=MODEL)
    give_up = time.monotonic() + SECONDS
    while True:
        record = user.world.do(lambda bus: bus.table(topology.RUNS).get(training.model_id))
        assert record is not None
        if record.value.closed:
            return
        assert time.monotonic() < give_up, "the coordinator does not close the runs of an ended session"
        time.sleep(0.1)


@means("a session's heartbeat is renewed while its client lives", "ServiceClient.create_sampling_client")
def test_a_living_client_keeps_its_session_alive(user: User) -> None:
    session = user.base().holder.get_session_id()

    def beat() -> float:
        entry = user.world.do(lambda bus: bus.table(topology.HEARTBEATS).get(session))
        assert entry is not None
        return entry.value.at

    first, give_up = beat(), time.monotonic() + SECONDS
    while beat() == first:  # the client sends one every ten seconds
        assert time.monotonic() < give_up
        time.sleep(0.5)
