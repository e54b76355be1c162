"""Checkpoints: their names outside (`tinker://RUN/weights/NAME`), and what becomes of their records and blobs.

A record is written after its blobs and removed before them, so nobody finds one whose blobs are not there. Records of
one name are ordered by the seq of the operations that wrote them: an operation that is done again, or by a trainer that
has lost the run, never replaces what a later one wrote.

The files of a sampler checkpoint are those of its policy. They stay as long as anybody may sample from it, so it is the
coordinator's janitor that removes them.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from shared import topology
from shared.blobs import BlobStore
from shared.bus import Bus
from shared.contracts.blobs import BlobRef
from shared.contracts.checkpoints import CHECKPOINT_NAME, CheckpointKey, CheckpointKind, CheckpointRecord
from shared.contracts.policies import PolicyRecord, PolicyRef
from shared.errors import PermanentError, UserError
from shared.tables import Entry

SCHEME = "tinker://"
SEGMENTS: dict[CheckpointKind, str] = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}
"""How each kind is called in paths and ids."""
_KINDS = {segment: kind for kind, segment in SEGMENTS.items()}
_EXAMPLE = f"{SCHEME}RUN/weights/NAME"


def id_of(key: CheckpointKey) -> str:
    """Names a checkpoint among those of its run: `weights/NAME`."""
    return f"{SEGMENTS[key.kind]}/{key.name}"


def path_of(key: CheckpointKey) -> str:
    """Names a checkpoint: `tinker://RUN/weights/NAME`."""
    return f"{SCHEME}{key.run}/{id_of(key)}"


def parse_id(run: str, text: str) -> CheckpointKey:
    """The checkpoint that an id names. Raise `UserError` for anything else."""
    segment, slash, name = text.partition("/")
    if not slash or segment not in _KINDS:
        known = ", ".join(f"{each}/NAME" for each in _KINDS)
        raise UserError(f"{text!r} names no checkpoint: write it as one of {known}")
    if not re.fullmatch(CHECKPOINT_NAME, name):
        raise UserError(
            f"{name!r} is no name of a checkpoint: use up to 127 letters, digits, '.', '_' and '-', and begin with a "
            "letter or a digit"
        )
    return CheckpointKey(run=run, kind=_KINDS[segment], name=name)


def parse_path(text: str) -> CheckpointKey:
    """The checkpoint that a path names. Raise `UserError` for anything else."""
    run, slash, rest = text.removeprefix(SCHEME).partition("/")
    if not text.startswith(SCHEME) or not slash or not 0 < len(run) <= topology.MAX_NAME:
        raise UserError(f"{text!r} is no path of a checkpoint: write {_EXAMPLE}")
    return parse_id(run, rest)


def blobs_of(record: CheckpointRecord) -> list[BlobRef]:
    """All blobs that a record names."""
    return [*([record.state] if record.state is not None else []), *record.files.values()]


def details_of(record: CheckpointRecord) -> dict[str, Any]:
    """A checkpoint in the details of an audit entry; with what its use is counted by once the record is gone."""
    return {
        "model_id": record.key.run,
        "tinker_path": path_of(record.key),
        "owner": record.owner,
        "base_model": record.base_model,
        "size": record.size,
        "created": record.created,
    }


def key_in_bucket(key: CheckpointKey) -> tuple[str, str, str]:
    """Where the `checkpoints` bucket has it."""
    return key.run, key.kind, key.name


class Checkpoints:
    """The records of checkpoints and their blobs. Raises `TemporaryError` where bus or store are away."""

    def __init__(self, bus: Bus, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._table = bus.table(topology.CHECKPOINTS)
        self._policies = bus.table(topology.POLICIES)

    async def find(self, key: CheckpointKey) -> Entry[CheckpointRecord] | None:
        """The record and its revision."""
        return await self._table.get(key_in_bucket(key))

    async def of_run(self, run: str) -> list[CheckpointRecord]:
        """All checkpoints of a run, the latest written last."""
        return [entry.value for entry in await self._table.items(run)]

    # -- by the trainer ------------------------------------------------------------------------------------------

    async def done_before(self, key: CheckpointKey, seq: int, *, overwrite: bool) -> CheckpointRecord | None:
        """What operation `seq`, or a later one, has recorded under this name already.

        Raise `UserError` if the name is taken by an earlier one that may not be overwritten.
        """
        entry = await self.find(key)
        if entry is None or (overwrite and entry.value.seq < seq):
            return None
        if entry.value.seq < seq:
            raise _taken(key)
        return entry.value

    async def record(self, record: CheckpointRecord, *, overwrite: bool) -> CheckpointRecord:
        """Write a record whose blobs are there, and return it, or the one that `done_before` finds meanwhile."""
        while True:
            if (there := await self.done_before(record.key, record.seq, overwrite=overwrite)) is not None:
                return there
            entry = await self.find(record.key)
            if entry is None:
                written = await self._table.create(key_in_bucket(record.key), record)
            else:
                written = await self._table.update(key_in_bucket(record.key), record, entry.revision)
            if written is not None:
                if entry is not None:
                    await self._delete_blobs(entry.value, keep=record)
                return record

    # -- by their owners and the janitor -------------------------------------------------------------------------

    async def delete(self, key: CheckpointKey, *, revision: int | None = None) -> bool:
        """Remove a checkpoint, if it is still at `revision`. False: it is gone, or another one now."""
        entry = await self.find(key)
        if entry is None or (revision is not None and entry.revision != revision):
            return False
        if not await self._table.delete_if(key_in_bucket(key), entry.revision):
            return False
        await self._delete_blobs(entry.value)
        return True

    async def change(self, key: CheckpointKey, **changes: Any) -> CheckpointRecord | None:
        """Change fields of a record, for instance `public` or `expires`. None: there is no such checkpoint."""
        while (entry := await self.find(key)) is not None:
            changed = msgspec.structs.replace(entry.value, **changes)
            if await self._table.update(key_in_bucket(key), changed, entry.revision) is not None:
                return changed
        return None

    async def copy(
        self, source: CheckpointRecord, to: CheckpointKey, *, owner: str, created: float, expires: float | None
    ) -> CheckpointRecord:
        """Copy a checkpoint with its blobs to another run, which nobody trains, and return the copy's record.

        The copy is private and does not expire with its source. Done again, it finds what it did before. Raise
        `UserError` if the source is deleted meanwhile.
        """
        if to.kind != source.key.kind:
            raise UserError(f"a {source.key.kind} checkpoint cannot become a {to.kind} checkpoint: keep its kind")
        if (there := await self.find(to)) is not None:
            return there.value
        copy = msgspec.structs.replace(
            source, key=to, owner=owner, seq=0, created=created, expires=expires, public=False
        )
        try:
            copy = await self._with_own_blobs(copy, source)
        except PermanentError as error:
            if await self.find(source.key) is not None:
                raise
            raise UserError(f"{path_of(source.key)} was deleted while it was copied") from error
        return await self.record(copy, overwrite=False)

    async def _with_own_blobs(self, copy: CheckpointRecord, source: CheckpointRecord) -> CheckpointRecord:
        if source.policy is not None:
            policy = await self._copy_policy(source.policy, PolicyRef(run=copy.key.run, version=0), copy.owner)
            return msgspec.structs.replace(copy, policy=policy.policy, files=files_of(policy))
        # A name may hold what makes it too long for a file's, once escaped; and each record has blobs of its own.
        own = hashlib.sha256(str(copy.key).encode()).hexdigest()[:12]
        folder = f"checkpoints/{topology.token(copy.key.run)}/copy-{own}"
        if source.state is not None:
            state = await self._blobs.copy(source.state, f"{folder}/state.safetensors")
            copy = msgspec.structs.replace(copy, state=state)
        files = {name: await self._blobs.copy(ref, f"{folder}/{name}") for name, ref in source.files.items()}
        return msgspec.structs.replace(copy, files=files)

    async def _copy_policy(self, source: PolicyRef, to: PolicyRef, owner: str) -> PolicyRecord:
        entry = await self._policies.get((source.run, str(source.version)))
        if entry is None:
            raise PermanentError(f"policy {source} does not exist (any more)")
        folder = f"policies/{topology.token(to.run)}/{to.version}-{entry.value.weights.sha256[:12]}"
        copy = msgspec.structs.replace(
            entry.value,
            policy=to,
            owner=owner,
            config=await self._blobs.copy(entry.value.config, f"{folder}/adapter_config.json"),
            weights=await self._blobs.copy(entry.value.weights, f"{folder}/adapter_model.safetensors"),
        )
        await self._policies.create((to.run, str(to.version)), copy)
        return copy

    async def _delete_blobs(self, record: CheckpointRecord, keep: CheckpointRecord | None = None) -> None:
        if record.policy is not None:
            return
        kept = {ref.key for ref in blobs_of(keep)} if keep is not None else set()
        for ref in blobs_of(record):
            if ref.key not in kept:
                await self._blobs.delete(ref.key)


def files_of(policy: PolicyRecord) -> dict[str, BlobRef]:
    """A policy's files by their names."""
    return {"adapter_config.json": policy.config, "adapter_model.safetensors": policy.weights}


def _taken(key: CheckpointKey) -> UserError:
    return UserError(
        f"{path_of(key)} exists already: save under another name, set overwrite to replace it, or delete it first"
    )
