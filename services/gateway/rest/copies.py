"""Copies of checkpoints: into a run that nobody trains, which belongs to the copier."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from services.gateway import ids
from services.gateway.access import readable_checkpoint
from services.gateway.context import Call, Endpoint, Gateway
from services.gateway.rest.answers import Copied
from services.gateway.rest.checkpoints import Ttl
from services.gateway.rest.holdings import ACCESS_TOKEN, store
from shared.checkpoints import details_of, parse_path, path_of
from shared.contracts.base import Strict
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord
from shared.contracts.sessions import SessionRecord
from shared.contracts.training import RunRecord
from shared.errors import UserError

IDEMPOTENCY_KEY = b"x-idempotency-key"


class Copy(Strict):
    """Asks for a copy in a project, or in a run of a session that is not there yet."""

    source_path: str
    destination_project_id: str | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    ttl_seconds: Ttl | None = None
    weights_access_token: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a copy goes."""

    session: str
    number: int

    @property
    def run(self) -> str:
        """The run."""
        return ids.Owned(self.session, "train", self.number).id


async def copy(gateway: Gateway, call: Call) -> Copied:
    """Copy a checkpoint. The same request again, as its idempotency key tells, finds the same copy."""
    asked: Copy = call.body
    token = call.header(ACCESS_TOKEN) or asked.weights_access_token or ""
    source = await readable_checkpoint(gateway, call, parse_path(asked.source_path), "copy", token)
    now = time.time()
    place = await _place(gateway, call, asked, now)
    await _make_run(gateway, call, place, source, now)
    expires = None if asked.ttl_seconds is None else now + asked.ttl_seconds
    key = CheckpointKey(run=place.run, kind=source.key.kind, name=source.key.name)
    made = await store(gateway).copy(source, key, owner=call.caller.tenant, created=now, expires=expires)
    await gateway.audit(call, "checkpoint_copied", source=path_of(source.key), **details_of(made))
    return Copied(path_of(made.key))


async def _place(gateway: Gateway, call: Call, asked: Copy, now: float) -> Place:
    if asked.session_id is not None:
        if asked.destination_project_id is not None or asked.model_seq_id is None or asked.model_seq_id < 0:
            raise UserError(
                "give either destination_project_id, or session_id and with it model_seq_id, the number from 0 of a "
                "run that is not there yet"
            )
        await gateway.records.open_session(call.caller, asked.session_id)
        return Place(asked.session_id, asked.model_seq_id)
    if not asked.destination_project_id:
        raise UserError("destination_project_id is missing: name the project that the copy goes to")
    return Place(await _make_session(gateway, call, asked.destination_project_id, now), 0)


async def _make_session(gateway: Gateway, call: Call, project: str, now: float) -> str:
    record = SessionRecord(
        session=_session_of(call),
        owner=call.caller.tenant,
        created=now,
        project=project,
        display_name="copied weights",
        ended="success",  # no client keeps it alive
        ended_at=now,
    )
    await gateway.records.sessions.table.create(record.session, record)
    return record.session


def _session_of(call: Call) -> str:
    if not (key := call.header(IDEMPOTENCY_KEY)):
        return ids.new_session()
    return f"s-{hashlib.sha256(f'{call.caller.tenant} {key}'.encode()).hexdigest()[:24]}"


async def _make_run(gateway: Gateway, call: Call, place: Place, source: CheckpointRecord, now: float) -> None:
    record = RunRecord(
        run=place.run,
        base_model=source.base_model,
        lora=source.lora,
        owner=call.caller.tenant,
        closed=True,  # it takes no operations
        session=place.session,
        created=now,
        user_metadata={"copied_from": path_of(source.key)},
    )
    table = gateway.records.runs.table
    if await table.create(place.run, record) is not None:
        return
    there = await table.get(place.run)
    if there is not None and there.value.user_metadata != record.user_metadata:
        raise UserError(f"run {place.run} is there already: copy to another model_seq_id")


ENDPOINTS = (Endpoint("POST", "copy_weights", copy, body=Copy),)
