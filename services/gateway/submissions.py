"""Operations on their way into a run's log.

What is refused here goes into the log as well, as `Refused`: a client counts its operations and waits for each, so a
gap would hold up all that follow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from services.gateway import ids
from services.gateway.context import Call, Gateway
from services.gateway.errors import TooMany
from shared import topology
from shared.contracts.base import Contract
from shared.contracts.sessions import RunActivity
from shared.contracts.training import AnyOperation, ForwardBackward, Refused, RunRecord
from shared.errors import MeshError, UserError, failure_of

log = logging.getLogger(__name__)

MOST_SEQ = 2**31 - 1
ACTIVITY_SECONDS = 10.0
"""How exactly it is known when a run was last used."""

T = TypeVar("T")
Head = dict[str, Any]
Make = Callable[[RunRecord, Head], Awaitable[AnyOperation]]


class Addressed(Contract):
    """What every request for an operation says: which run, and its place among the run's operations."""

    model_id: str
    seq_id: int


def addressed(body: bytes) -> Addressed:
    """Where a JSON request belongs. Raise `UserError` if it does not say so."""
    return decoded(body, Addressed)


def decoded(body: bytes, kind: type[T]) -> T:
    """A JSON body. Raise `UserError` that names the field and what is wrong with it."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the body is not what is expected: {error}") from None


async def operation(gateway: Gateway, call: Call, where: Addressed, make: Make) -> dict[str, str]:
    """Put an operation into its run's log, or why it was refused, and return the promise of its result.

    `make` may raise `UserError`. Raise `NotFound` for a run that is not the caller's and `TooMany` at a limit; then
    nothing was written.
    """
    owned = ids.parse_run(where.model_id)
    run = await gateway.records.open_run(call.caller, where.model_id)
    if not 1 <= where.seq_id <= MOST_SEQ:
        raise UserError(f"seq_id {where.seq_id} is not possible: operations of a run are numbered from 1")
    head: Head = {
        "run": run.run,
        "seq": where.seq_id,
        "request_id": owned.request(where.seq_id),
        "owner": run.owner,
    }
    made: AnyOperation
    try:
        made = await make(run, head)
    except UserError as error:
        made = Refused(**head, failure=failure_of(error))
    return await submit(gateway, owned.session, made)


async def submit(gateway: Gateway, session: str, operation: AnyOperation) -> dict[str, str]:
    """Put an operation into its run's log. Once more changes nothing. Raise `TooMany` or `TemporaryError`."""
    request, owner = operation.request_id, operation.owner
    tokens = tokens_of(operation)
    if request not in gateway.in_flight:
        admit(gateway, owner, tokens)
    await gateway.hub.listen(session)
    gateway.in_flight.add(request, owner, tokens)
    try:
        msg_id = f"{operation.run}/{operation.seq}"
        await gateway.bus.publish(topology.OPERATIONS, operation, msg_id=msg_id, run=operation.run)
    except MeshError:
        gateway.in_flight.remove(request)
        raise
    _note_activity(gateway, operation.run)
    return {"request_id": request, "model_id": operation.run}


def admit(gateway: Gateway, tenant: str, tokens: int) -> None:
    """Raise `TooMany` if a tenant has no room for a request of so many tokens now."""
    refusal = gateway.in_flight.refusal(tenant, gateway.limits_of(tenant), tokens)
    if refusal is not None:
        gateway.metrics.refused.labels(tenant).inc()
        raise TooMany(f"{refusal}: wait for some of them")


def tokens_of(operation: AnyOperation) -> int:
    """Tokens that an operation has a trainer compute."""
    return sum(len(datum.tokens) for datum in operation.data) if isinstance(operation, ForwardBackward) else 0


def _note_activity(gateway: Gateway, run: str) -> None:
    now = time.time()
    if now - gateway.activity.get(run, 0.0) < ACTIVITY_SECONDS:
        return
    gateway.activity[run] = now
    gateway.tasks.start(f"activity of {run}", _write_activity(gateway, run, now))


async def _write_activity(gateway: Gateway, run: str, now: float) -> None:
    try:
        await gateway.bus.table(topology.ACTIVITY).put(run, RunActivity(at=now))
    except MeshError as error:
        log.warning("when run %s was used is not written down: %s", run, error)
