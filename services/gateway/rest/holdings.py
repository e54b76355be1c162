"""What callers own: found for a change, or for a list. Others' things look as if they were not there."""

from __future__ import annotations

from collections.abc import Iterator

from services.gateway.access import is_live
from services.gateway.auth import Caller
from services.gateway.context import Call, Gateway
from services.gateway.errors import NotFound
from services.gateway.ids import shown
from services.gateway.rest.queries import Scope
from shared.checkpoints import Checkpoints, parse_id, path_of
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord
from shared.contracts.training import RunRecord
from shared.tables import Entry

ACCESS_TOKEN = b"x-tinker-weights-access-token"


def store(gateway: Gateway) -> Checkpoints:
    """The checkpoints as the bus has them."""
    return Checkpoints(gateway.bus, gateway.blobs)


def key_of(call: Call) -> CheckpointKey:
    """The checkpoint that a request's path names. Raise `UserError`."""
    return parse_id(call.path["run"], f"{call.path['folder']}/{call.path['name']}")


async def owned(gateway: Gateway, caller: Caller, key: CheckpointKey) -> Entry[CheckpointRecord]:
    """A checkpoint of the caller's, which it may change. Raise `NotFound`."""
    entry = await store(gateway).find(key)
    if entry is None or entry.value.owner != caller.tenant or not is_live(entry.value):
        raise _no_such(key)
    return entry


async def live_checkpoints(gateway: Gateway) -> Iterator[CheckpointRecord]:
    """All checkpoints of everybody that have not expired."""
    return (record for record in (await gateway.checkpoints.fresh()).values() if is_live(record))


async def visible_runs(gateway: Gateway, scope: Scope) -> list[RunRecord]:
    """The runs that somebody asks for, newest first."""
    runs = [run for run in (await gateway.runs.fresh()).values() if scope.has(run.owner)]
    return sorted(runs, key=lambda run: (run.created, run.run), reverse=True)


def _no_such(key: CheckpointKey) -> NotFound:
    return NotFound(f"there is no checkpoint {shown(path_of(key), 240)}")
