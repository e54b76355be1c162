"""What a run saves: checkpoints to go on from, to sample from and to download, and samplers without a name."""

from __future__ import annotations

import time
from typing import Any, Literal

from services.gateway import ids, submissions
from services.gateway.context import Call, Endpoint, Gateway
from services.gateway.ids import Owned
from services.gateway.submissions import Head
from shared import checkpoints
from shared.contracts.base import Strict
from shared.contracts.checkpoints import CheckpointKey, CheckpointKind, SaveSpec
from shared.contracts.policies import PolicyRef
from shared.contracts.sessions import SamplerRecord
from shared.contracts.training import AnyOperation, RunRecord, SaveExternal, SavePolicy, SaveState
from shared.errors import UserError

LEAST_TTL, MOST_TTL = 3600, 10 * 365 * 24 * 3600
MOST_RECIPIENTS = 10
MOST_METADATA = 16 * 1024
MOST_SAMPLERS = 10**9


class SaveWeights(Strict):
    """Saves a checkpoint to go on from."""

    model_id: str
    seq_id: int
    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights"] = "save_weights"


class SaveForSampler(Strict):
    """Saves a checkpoint to sample from, or makes a sampler of the present weights."""

    model_id: str
    seq_id: int
    path: str | None = None
    sampling_session_seq_id: int | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsExternal(Strict):
    """Saves an adapter's files to download."""

    model_id: str
    seq_id: int
    path: str
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


async def save(gateway: Gateway, call: Call) -> dict[str, str]:
    """Save weights and optimizer."""

    async def make(run: RunRecord, head: Head) -> AnyOperation:
        asked = submissions.decoded(call.body, SaveWeights)
        name = asked.path if asked.path is not None else f"seq-{asked.seq_id}"
        _check_room(gateway, run.owner)
        spec = _spec(run.run, "training", name, asked.ttl_seconds, asked.user_metadata, overwrite=asked.overwrite)
        return SaveState(**head, name=name, checkpoint=spec)

    return await submissions.operation(gateway, call, submissions.addressed(call.body), make)


async def save_for_sampler(gateway: Gateway, call: Call) -> dict[str, str]:
    """Save weights to sample from."""

    async def make(run: RunRecord, head: Head) -> AnyOperation:
        asked = submissions.decoded(call.body, SaveForSampler)
        if asked.path is not None:
            _check_room(gateway, run.owner)
            spec = _spec(run.run, "sampler", asked.path, asked.ttl_seconds, asked.user_metadata)
            return SavePolicy(**head, version=head["seq"], checkpoint=spec)
        sampler = await _new_sampler(gateway, run, head["seq"], asked)
        return SavePolicy(**head, version=head["seq"], inflight=asked.kind == "inflight", note=sampler)

    return await submissions.operation(gateway, call, submissions.addressed(call.body), make)


async def save_external(gateway: Gateway, call: Call) -> dict[str, str]:
    """Save files to download."""

    async def make(run: RunRecord, head: Head) -> AnyOperation:
        asked = submissions.decoded(call.body, SaveWeightsExternal)
        recipients = asked.age_encryption_recipients or []
        if len(recipients) > MOST_RECIPIENTS:
            raise UserError(f"{len(recipients)} age_encryption_recipients were given: give {MOST_RECIPIENTS} at most")
        _check_room(gateway, run.owner)
        spec = _spec(run.run, "external", asked.path, asked.ttl_seconds, None)
        return SaveExternal(**head, checkpoint=spec, recipients=recipients)

    return await submissions.operation(gateway, call, submissions.addressed(call.body), make)


async def _new_sampler(gateway: Gateway, run: RunRecord, seq: int, asked: SaveForSampler) -> str:
    number = asked.sampling_session_seq_id
    if number is None or not 0 <= number < MOST_SAMPLERS:
        raise UserError("give a path, or a sampling_session_seq_id from 0")
    sampler = Owned(ids.parse_run(run.run).session, "sample", number).id
    record = SamplerRecord(
        sampler=sampler,
        session=run.session,
        owner=run.owner,
        base_model=run.base_model,
        policy=PolicyRef(run=run.run, version=seq),
        inflight=asked.kind == "inflight",
        created=time.time(),
        model_name=run.model_name,
    )
    await new_sampler(gateway, record)
    return sampler


async def new_sampler(gateway: Gateway, record: SamplerRecord) -> None:
    """Record a sampler; once more is no error. Raise `UserError` if its id names another one."""
    table = gateway.records.samplers.table
    if await table.create(record.sampler, record) is not None:
        return
    entry = await table.get(record.sampler)
    there = entry.value if entry is not None else None
    same = there is not None and (there.policy, there.base_model, there.inflight) == (
        record.policy,
        record.base_model,
        record.inflight,
    )
    if not same:
        raise UserError(f"sampling session {record.sampler} exists already, of something else: use another number")


def _spec(
    run: str,
    kind: CheckpointKind,
    name: str,
    ttl_seconds: int | None,
    user_metadata: dict[str, str] | None,
    *,
    overwrite: bool = False,
) -> SaveSpec:
    checkpoints.parse_id(run, checkpoints.id_of(CheckpointKey(run=run, kind=kind, name=name)))
    check_ttl(ttl_seconds)
    metadata: dict[str, Any] = user_metadata or {}
    if sum(len(key) + len(value) for key, value in metadata.items()) > MOST_METADATA:
        raise UserError(f"user_metadata has more than {MOST_METADATA} characters: keep what is large elsewhere")
    return SaveSpec(name=name, ttl_seconds=ttl_seconds, overwrite=overwrite, user_metadata=metadata)


def check_ttl(seconds: int | None) -> None:
    """Raise `UserError` for a time to live outside of what clients know."""
    if seconds is not None and not LEAST_TTL <= seconds <= MOST_TTL:
        raise UserError(
            f"ttl_seconds is {seconds}: give {LEAST_TTL} (an hour) to {MOST_TTL} (ten years), or None for ever"
        )


def _check_room(gateway: Gateway, tenant: str) -> None:
    most = gateway.limits_of(tenant).checkpoint_bytes
    there = sum(record.size for record in gateway.checkpoints.values.values() if record.owner == tenant)
    if most is not None and there >= most:
        raise UserError(f"{tenant} has {there} bytes of checkpoints and may have {most}: delete some")


ENDPOINTS = (
    Endpoint("POST", "save_weights", save, body=bytes),
    Endpoint("POST", "save_weights_for_sampler", save_for_sampler, body=bytes),
    Endpoint("POST", "save_weights_external", save_external, body=bytes),
)
