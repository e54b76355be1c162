"""What a TrainingClient saves and loads, and that it means the same to whoever reads it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyrage
import pytest
import tinker

from tests.mesh.sdk.data import CLOSE, OTHERS, TOKENS, Reference, fetched, learn, loss, scores
from tests.mesh.sdk.declared import DEPRECATED_TOO, means
from tests.mesh.sdk.world import SECONDS, User, wait

pytestmark = DEPRECATED_TOO


def checkpoint(user: User, path: str) -> tinker.types.Checkpoint:
    found = user.rest.list_user_checkpoints().result().checkpoints
    return next(each for each in found if each.tinker_path == path)


def differs_from(here: list[float], there: list[float]) -> bool:
    return max(abs(one - other) for one, other in zip(here, there, strict=True)) > 0.05


@means(
    "a path of the run and the name, with time to live and metadata; the same name again is refused unless "
    "`overwrite` is given",
    "TrainingClient.save_state",
    "TrainingClient.save_state_async",
)
def test_a_state_is_saved_once_under_a_name(user: User) -> None:
    training = user.train()
    path = training.save_state("one", ttl_seconds=7200, user_metadata={"step": "0"}).result().path
    assert path == f"tinker://{training.model_id}/weights/one"
    found = checkpoint(user, path)
    assert (found.checkpoint_type, found.user_metadata) == ("training", {"step": "0"})
    assert found.expires_at is not None
    assert found.expires_at.timestamp() == pytest.approx(time.time() + 7200, abs=60)
    learn(training)
    with pytest.raises(tinker.RequestFailedError, match="overwrite") as raised:
        training.save_state("one").result()
    assert raised.value.category == "user"
    assert wait(training.save_state_async("one", overwrite=True)).result().path == path
    again = user.service.create_training_client_from_state(path).result(SECONDS)
    assert loss(again) == pytest.approx(loss(training), abs=CLOSE)
    with pytest.raises(tinker.RequestFailedError, match="ttl_seconds"):
        training.save_state("two", ttl_seconds=5).result()


@means(
    "into a run that is there: the weights of the checkpoint; without the optimizer it begins anew, with it it goes "
    "on: losses of the next steps tell",
    "TrainingClient.load_state",
    "TrainingClient.load_state_async",
    "TrainingClient.load_state_with_optimizer",
    "TrainingClient.load_state_with_optimizer_async",
)
def test_a_state_is_loaded_into_a_run(user: User) -> None:
    training = user.train()
    learn(training)
    saving = training.save_state("middle")
    expected = learn(training, 4)
    path = saving.result().path
    fresh = user.service.create_training_client_from_state(path).result(SECONDS)
    anew = learn(fresh, 4)
    assert anew[0] == pytest.approx(expected[0], abs=CLOSE)
    assert differs_from(anew, expected), "the test could not tell otherwise"
    ways: tuple[tuple[Callable[[], Any], list[float]], ...] = (
        (lambda: training.load_state_with_optimizer(path), expected),
        (lambda: wait(training.load_state_with_optimizer_async(path)), expected),
        (lambda: training.load_state(path), anew),
        (lambda: wait(training.load_state_async(path)), anew),
    )
    for load, losses in ways:
        load()  # not waited for: what comes behind it is done behind it
        assert learn(training, 4) == pytest.approx(losses, abs=CLOSE)
    with pytest.raises((tinker.RequestFailedError, tinker.NotFoundError)):
        training.load_state(path + "-not").result()


@means(
    "a path that can be sampled: by whoever may, with the weights of that moment, also after further training",
    "TrainingClient.save_weights_for_sampler",
    "TrainingClient.save_weights_for_sampler_async",
    "TrainingClient.create_sampling_client",
    "TrainingClient.create_sampling_client_async",
)
def test_old_samplers_keep_old_weights(user: User) -> None:
    training = user.train()
    learn(training)
    path = training.save_weights_for_sampler("old", ttl_seconds=3600, user_metadata={"a": "b"}).result().path
    assert path == f"tinker://{training.model_id}/sampler_weights/old"
    assert checkpoint(user, path).user_metadata == {"a": "b"}
    old = training.create_sampling_client(path).result(SECONDS)
    before, expected = scores(old), loss(training)
    assert -sum(before) == pytest.approx(expected, abs=CLOSE)
    learn(training, 5, OTHERS)
    newer = wait(training.save_weights_for_sampler_async("new")).result().path
    new = wait(training.create_sampling_client_async(newer))
    assert differs_from(scores(new), before)
    again = training.create_sampling_client(path).result(SECONDS)
    assert scores(old) == pytest.approx(before, abs=CLOSE)
    assert scores(again) == pytest.approx(before, abs=CLOSE)


@means(
    "snapshot: keeps the weights of its moment; inflight: follows its run, as soon as newer weights are saved this way",
    "TrainingClient.save_weights_and_get_sampling_client",
    "TrainingClient.save_weights_and_get_sampling_client_async",
)
def test_a_snapshot_stays_and_an_inflight_sampler_follows(user: User) -> None:
    training = user.train()
    save = training.save_weights_and_get_sampling_client
    snapshot, inflight = save().result(SECONDS), save(kind="inflight").result(SECONDS)
    before = scores(snapshot)
    assert scores(inflight) == pytest.approx(before, abs=CLOSE)
    learn(training, 5)
    newest = wait(training.save_weights_and_get_sampling_client_async(kind="inflight"))
    learned = scores(newest)
    assert differs_from(learned, before)
    give_up = time.monotonic() + SECONDS
    while scores(inflight) != pytest.approx(learned, abs=CLOSE):
        assert time.monotonic() < give_up, "a sampler in flight does not follow its run"
    assert scores(snapshot) == pytest.approx(before, abs=CLOSE)


@means(
    "files in PEFT's format behind links: PEFT with transformers computes the same log-probabilities with them as the "
    "mesh's sampler; encrypted with age they open with the recipient's key and nothing else",
    "TrainingClient.save_weights_external",
    "TrainingClient.save_weights_external_async",
    "RestClient.get_external_weights_urls",
)
def test_files_to_download_are_the_weights(user: User, tmp_path: Path) -> None:
    training, identity = user.train(), pyrage.x25519.Identity.generate()
    learn(training)
    plain = training.save_weights_external("plain").result().path
    recipients = [str(identity.to_public())]
    sealing = training.save_weights_external_async("sealed", age_encryption_recipients=recipients)
    sealed = wait(sealing).result().path
    assert plain == f"tinker://{training.model_id}/external_weights/plain"
    files, hidden = (fetched(user.rest.get_external_weights_urls(path).result().urls) for path in (plain, sealed))
    opened = {name.removesuffix(".age"): pyrage.decrypt(content, [identity]) for name, content in hidden.items()}
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(next(iter(hidden.values())), [pyrage.x25519.Identity.generate()])
    sampler = training.save_weights_and_get_sampling_client().result(SECONDS)
    for number, content in enumerate((files, opened)):
        directory = tmp_path / str(number)
        directory.mkdir()
        for name, written in content.items():
            (directory / name).write_bytes(written)
        here = Reference(user.world.model_dir, directory)
        assert here.scores(TOKENS) == pytest.approx(scores(sampler), abs=CLOSE)
    with pytest.raises(tinker.RequestFailedError) as raised:
        training.save_weights_external("bad", age_encryption_recipients=["nobody"]).result()
    assert raised.value.category == "user"
