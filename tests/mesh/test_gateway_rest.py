"""Runs and checkpoints, as the real client's RestClient looks them up and changes them."""

from __future__ import annotations

import time
from datetime import datetime
from functools import partial

import pytest
import tinker

from shared import topology
from shared.contracts.sessions import RunActivity
from tests.mesh.gateway_records import NOW, Records, ask, client
from tests.mesh.gateways import OTHER_KEY
from tests.mesh.harness import MODEL, Place

pytestmark = [
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
    pytest.mark.filterwarnings("ignore::tinker.lib.experimental.ExperimentalWarning"),
]


async def test_runs_are_listed_newest_first_with_their_last_checkpoints(gateway: str, records: Records) -> None:
    session = await records.session("s-1", NOW - 100, project="p")
    other = await records.session("s-2", NOW - 100, owner="other")
    first = await records.run(session, 0, NOW - 90, user_metadata={"purpose": "test"})
    second = await records.run(session, 1, NOW - 80)
    await records.run(other, 0, NOW - 70, owner="other")
    await records.bus.table(topology.ACTIVITY).put(first, RunActivity(at=NOW - 5))
    await records.checkpoint(first, "training", "a", NOW - 60)
    newest = await records.checkpoint(first, "training", "b", NOW - 50)
    sampler = await records.checkpoint(first, "sampler", "c", NOW - 55)
    await records.checkpoint(first, "training", "gone", NOW - 40, expires=NOW - 1)
    rest = await client(gateway)

    found = await ask(rest.list_training_runs)
    assert [run.training_run_id for run in found.training_runs] == [second, first]
    assert (found.cursor.offset, found.cursor.limit, found.cursor.total_count) == (0, 20, 2)
    run = found.training_runs[1]
    assert (run.base_model, run.is_lora, run.lora_rank, run.corrupted) == (MODEL, True, 8, False)
    assert run.last_request_time.timestamp() == pytest.approx(NOW - 5)
    assert found.training_runs[0].last_request_time.timestamp() == pytest.approx(NOW - 80)
    assert run.last_checkpoint.tinker_path == newest
    assert run.last_sampler_checkpoint.tinker_path == sampler
    assert run.user_metadata == {"purpose": "test"}
    assert found.training_runs[0].last_checkpoint is None

    page = await ask(lambda: rest.list_training_runs(limit=1, offset=1))
    assert [run.training_run_id for run in page.training_runs] == [first]
    assert (await ask(lambda: rest.list_training_runs(project_id="p"))).cursor.total_count == 2
    assert (await ask(lambda: rest.list_training_runs(project_id="q"))).training_runs == []
    assert (await ask(lambda: rest.get_training_run(first))) == run
    assert (await ask(lambda: rest.get_training_run_by_tinker_path(newest))) == run
    assert (await rest.list_training_runs_async()) == found
    assert (await rest.get_training_run_async(first)) == run
    assert (await rest.get_training_run_by_tinker_path_async(newest)) == run


async def test_checkpoints_of_a_run_and_of_everything(gateway: str, records: Records) -> None:
    session = await records.session("s-1", NOW - 100)
    run, second = await records.run(session, 0, NOW - 90), await records.run(session, 1, NOW - 80)
    paths = [
        await records.checkpoint(run, "training", "a", NOW - 60, user_metadata={"step": "1"}),
        await records.checkpoint(second, "sampler", "b", NOW - 50),
        await records.checkpoint(run, "external", "c", NOW - 40, expires=NOW + 5000, public=True),
    ]
    rest = await client(gateway)

    of_run = (await ask(lambda: rest.list_checkpoints(run))).checkpoints
    assert [each.tinker_path for each in of_run] == [paths[2], paths[0]]
    external, training = of_run
    assert (external.checkpoint_id, external.checkpoint_type, external.public) == (
        "external_weights/c",
        "external",
        True,
    )
    assert external.expires_at.timestamp() == pytest.approx(NOW + 5000)
    assert (training.time.timestamp(), training.size_bytes) == (pytest.approx(NOW - 60), 5)
    assert (training.public, training.expires_at, training.user_metadata) == (False, None, {"step": "1"})

    everything = await ask(rest.list_user_checkpoints)
    assert [each.tinker_path for each in everything.checkpoints] == list(reversed(paths))
    assert everything.cursor.total_count == 3
    page = await ask(lambda: rest.list_user_checkpoints(limit=1, offset=1))
    assert [each.tinker_path for each in page.checkpoints] == [paths[1]]
    assert (await rest.list_checkpoints_async(run)).checkpoints == of_run
    assert (await rest.list_user_checkpoints_async()) == everything


async def test_a_checkpoint_is_found_as_soon_as_it_is_written(gateway: str, records: Records) -> None:
    run = await records.run(await records.session("s-1", NOW), 0, NOW)
    rest = await client(gateway)
    for number in range(30):
        path = await records.checkpoint(run, "training", f"n-{number}", NOW + number)
        assert (await ask(rest.list_user_checkpoints)).checkpoints[0].tinker_path == path


async def test_what_is_public_can_be_read_by_others_and_nothing_else(gateway: str, records: Records) -> None:
    run = await records.run(await records.session("s-1", NOW), 0, NOW)
    path = await records.checkpoint(run, "training", "a", NOW)
    secret = await records.checkpoint(run, "training", "b", NOW)
    mine, theirs = await client(gateway), await client(gateway, OTHER_KEY)

    with pytest.raises(tinker.NotFoundError):
        await ask(lambda: theirs.get_weights_info_by_tinker_path(path))
    await ask(lambda: mine.publish_checkpoint_from_tinker_path(path))
    await ask(lambda: mine.publish_checkpoint_from_tinker_path(path))  # once more is no error
    info = await ask(lambda: theirs.get_weights_info_by_tinker_path(path))
    assert (info.base_model, info.lora_rank, info.is_lora) == (MODEL, 8, True)
    assert (info.train_mlp, info.train_attn, info.train_unembed) == (True, True, False)
    assert [each.tinker_path for each in (await ask(lambda: theirs.list_checkpoints(run))).checkpoints] == [path]
    with pytest.raises(tinker.NotFoundError):
        await ask(lambda: theirs.get_weights_info_by_tinker_path(secret))
    for change in (
        lambda: theirs.unpublish_checkpoint_from_tinker_path(path),
        lambda: theirs.publish_checkpoint_from_tinker_path(secret),
        lambda: theirs.set_checkpoint_ttl_from_tinker_path(path, 3600),
        lambda: theirs.delete_checkpoint_from_tinker_path(path),
    ):
        with pytest.raises(tinker.NotFoundError):
            await ask(change)
    await ask(lambda: mine.unpublish_checkpoint_from_tinker_path(path))
    with pytest.raises(tinker.NotFoundError):
        await ask(lambda: theirs.get_weights_info_by_tinker_path(path))
    with pytest.raises(tinker.NotFoundError):
        await ask(lambda: theirs.list_checkpoints(run))
    await mine.publish_checkpoint_from_tinker_path_async(path)
    await mine.unpublish_checkpoint_from_tinker_path_async(path)
    assert (await ask(lambda: mine.list_checkpoints(run))).checkpoints[0].public is False


async def test_a_time_to_live_is_set_within_bounds_and_removed(gateway: str, records: Records) -> None:
    run = await records.run(await records.session("s-1", NOW), 0, NOW)
    path = await records.checkpoint(run, "training", "a", NOW)
    rest = await client(gateway)

    async def expires() -> datetime | None:
        found: datetime | None = (await ask(lambda: rest.list_checkpoints(run))).checkpoints[0].expires_at
        return found

    await ask(lambda: rest.set_checkpoint_ttl_from_tinker_path(path, 3600))
    assert (await expires()).timestamp() == pytest.approx(time.time() + 3600, abs=60)  # type: ignore[union-attr]
    for seconds in (3599, 0, -1, 10 * 365 * 24 * 3600 + 1):
        with pytest.raises(tinker.BadRequestError):
            await ask(partial(rest.set_checkpoint_ttl_from_tinker_path, path, seconds))
    await rest.set_checkpoint_ttl_from_tinker_path_async(path, None)
    assert await expires() is None


async def test_a_deleted_checkpoint_is_gone_with_its_blobs(gateway: str, records: Records, place: Place) -> None:
    run = await records.run(await records.session("s-1", NOW), 0, NOW)
    paths = [await records.checkpoint(run, "training", name, NOW) for name in "abc"]
    rest = await client(gateway)
    blobs = list((place.directory / "blobs" / "checkpoints").rglob("*-training"))
    assert len(blobs) == 3

    await ask(lambda: rest.delete_checkpoint(run, "weights/a"))
    await ask(lambda: rest.delete_checkpoint_from_tinker_path(paths[1]))
    await rest.delete_checkpoint_async(run, "weights/c")
    assert (await ask(lambda: rest.list_checkpoints(run))).checkpoints == []
    assert not [blob for blob in blobs if blob.exists()]
    for again in paths:
        with pytest.raises(tinker.NotFoundError):
            await ask(partial(rest.delete_checkpoint_from_tinker_path, again))
    with pytest.raises(tinker.NotFoundError):
        await rest.delete_checkpoint_from_tinker_path_async(paths[0])


async def test_a_copy_belongs_to_the_copier_and_outlives_its_source(gateway: str, records: Records) -> None:
    run = await records.run(await records.session("s-1", NOW, owner="other"), 0, NOW, owner="other")
    source = await records.checkpoint(run, "training", "a", NOW, owner="other", public=False)
    mine, theirs = await client(gateway), await client(gateway, OTHER_KEY)

    with pytest.raises(tinker.NotFoundError):
        await ask(lambda: mine.copy_weights(source, "archive"))
    with pytest.raises(tinker.PermissionDeniedError):
        await ask(lambda: mine.copy_weights(source, "archive", weights_access_token="tml-wrong"))
    copied = await ask(lambda: mine.copy_weights(source, "archive", ttl_seconds=7200, weights_access_token=OTHER_KEY))
    assert copied.endswith("/weights/a")
    assert copied != source
    await ask(lambda: theirs.delete_checkpoint_from_tinker_path(source))

    made = (await ask(mine.list_user_checkpoints)).checkpoints
    assert [(each.tinker_path, each.checkpoint_type, each.public) for each in made] == [(copied, "training", False)]
    assert made[0].expires_at.timestamp() == pytest.approx(time.time() + 7200, abs=60)
    runs = (await ask(lambda: mine.list_training_runs(project_id="archive"))).training_runs
    assert [each.training_run_id for each in runs] == [copied.split("/")[2]]
    entry = await records.bus.table(topology.CHECKPOINTS).get((runs[0].training_run_id, "training", "a"))
    assert entry is not None
    assert entry.value.state is not None
    assert await records.bus.blobs.get(entry.value.state) == b"state"
    run_record = await records.bus.table(topology.RUNS).get(runs[0].training_run_id)
    assert run_record is not None
    assert run_record.value.closed

    own = await records.run(await records.session("s-2", NOW), 0, NOW)
    path = await records.checkpoint(own, "training", "b", NOW)
    again = await mine.copy_weights_async(path, "archive")
    assert again.endswith("/weights/b")
