"""Records of checkpoints and their blobs, on the real bus: replaced, deleted, copied, in whatever order."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shared import topology
from shared.blobs import BlobStore
from shared.bus import Bus
from shared.checkpoints import Checkpoints, files_of
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord
from shared.contracts.policies import LoraSpec, PolicyRecord, PolicyRef
from shared.errors import PermanentError, UserError

KEY = CheckpointKey(run="s-1:train:0", kind="training", name="a")
COPY = CheckpointKey(run="s-2:train:0", kind="training", name="b")


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(str(tmp_path / "blobs"))


@pytest.fixture
def checkpoints(bus: Bus, blobs: BlobStore) -> Checkpoints:
    return Checkpoints(bus, blobs)


async def saved(blobs: BlobStore, seq: int, key: CheckpointKey = KEY) -> CheckpointRecord:
    state = await blobs.put(f"checkpoints/x/{seq}", b"state %d" % seq)
    return CheckpointRecord(
        key=key, base_model="m", lora=LoraSpec(), owner="ann", seq=seq, created=1.0, size=state.size, state=state
    )


async def test_a_name_is_taken_until_it_is_overwritten_or_deleted(checkpoints: Checkpoints, blobs: BlobStore) -> None:
    first, second = await saved(blobs, 3), await saved(blobs, 5)
    assert first.state is not None
    assert second.state is not None
    assert await checkpoints.record(first, overwrite=False) == first
    with pytest.raises(UserError, match="tinker://s-1:train:0/weights/a exists already: .* overwrite"):
        await checkpoints.record(second, overwrite=False)
    assert await blobs.get(first.state) == b"state 3"
    await checkpoints.record(second, overwrite=True)
    with pytest.raises(PermanentError, match="missing"):
        await blobs.get(first.state)
    assert await blobs.get(second.state) == b"state 5"
    assert await checkpoints.of_run(KEY.run) == [second]
    assert await checkpoints.of_run("s-1:train") == []
    assert await checkpoints.delete(KEY)
    assert not await checkpoints.delete(KEY)
    with pytest.raises(PermanentError, match="missing"):
        await blobs.get(second.state)
    third = await saved(blobs, 7)
    assert await checkpoints.record(third, overwrite=False) == third


async def test_an_operation_done_again_finds_its_own_record_or_a_later_one(
    checkpoints: Checkpoints, blobs: BlobStore
) -> None:
    first, second = await saved(blobs, 3), await saved(blobs, 5)
    await checkpoints.record(first, overwrite=False)
    again = msgspec.structs.replace(first, created=9.0)
    assert await checkpoints.record(again, overwrite=False) == first
    await checkpoints.record(second, overwrite=True)
    for overwrite in (False, True):
        assert await checkpoints.record(again, overwrite=overwrite) == second
        assert await checkpoints.done_before(KEY, 3, overwrite=overwrite) == second
    assert second.state is not None
    assert await blobs.get(second.state) == b"state 5", "who is late must not remove what the later one wrote"


async def test_a_checkpoint_that_was_changed_meanwhile_is_not_deleted(
    checkpoints: Checkpoints, blobs: BlobStore
) -> None:
    await checkpoints.record(await saved(blobs, 3), overwrite=False)
    seen = await checkpoints.find(KEY)
    assert seen is not None
    changed = await checkpoints.change(KEY, expires=99.0, public=True)
    assert changed is not None
    assert (changed.expires, changed.public) == (99.0, True)
    assert not await checkpoints.delete(KEY, revision=seen.revision)
    assert await checkpoints.of_run(KEY.run) == [changed]
    assert await checkpoints.change(COPY, public=True) is None


async def test_a_copy_has_blobs_of_its_own(checkpoints: Checkpoints, blobs: BlobStore) -> None:
    source = await checkpoints.record(await saved(blobs, 3), overwrite=False)
    await checkpoints.change(KEY, public=True, expires=5.0)
    copy = await checkpoints.copy(source, COPY, owner="bob", created=2.0, expires=None)
    assert (copy.key, copy.owner, copy.created, copy.expires, copy.public) == (COPY, "bob", 2.0, None, False)
    assert await checkpoints.copy(source, COPY, owner="bob", created=3.0, expires=None) == copy
    await checkpoints.delete(KEY)
    assert copy.state is not None
    assert await blobs.get(copy.state) == b"state 3"
    other = msgspec.structs.replace(COPY, name="c")
    with pytest.raises(UserError, match="was deleted while it was copied"):
        await checkpoints.copy(source, other, owner="bob", created=2.0, expires=None)
    with pytest.raises(UserError, match="keep its kind"):
        await checkpoints.copy(
            copy, msgspec.structs.replace(COPY, kind="sampler"), owner="bob", created=2.0, expires=None
        )


async def test_a_copied_sampler_checkpoint_is_a_policy_of_its_own(
    bus: Bus, checkpoints: Checkpoints, blobs: BlobStore
) -> None:
    policy = PolicyRecord(
        policy=PolicyRef(run=KEY.run, version=3),
        base_model="m",
        lora=LoraSpec(),
        config=await blobs.put("policies/x/config", b"config"),
        weights=await blobs.put("policies/x/weights", b"weights"),
        owner="ann",
    )
    policies = bus.table(topology.POLICIES)
    await policies.create((KEY.run, "3"), policy)
    source = CheckpointRecord(
        key=msgspec.structs.replace(KEY, kind="sampler"),
        base_model="m",
        lora=LoraSpec(),
        owner="ann",
        seq=3,
        created=1.0,
        size=13,
        policy=policy.policy,
        files=files_of(policy),
    )
    to = msgspec.structs.replace(COPY, kind="sampler")
    copy = await checkpoints.copy(source, to, owner="bob", created=2.0, expires=None)
    assert copy.policy == PolicyRef(run=COPY.run, version=0)
    entry = await policies.get((COPY.run, "0"))
    assert entry is not None
    assert entry.value.owner == "bob"
    for ref in (policy.config, policy.weights):
        await blobs.delete(ref.key)
    assert await blobs.get(entry.value.weights) == b"weights"
    assert copy.files == files_of(entry.value)
    await checkpoints.delete(to)
    assert await blobs.get(entry.value.weights) == b"weights", "somebody may sample from it still"
