"""What endpoint functions are given: the gateway's parts, and the request."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

from services.gateway.auth import Caller, Callers
from services.gateway.config import GatewayConfig
from services.gateway.hub import Hub
from services.gateway.limits import InFlight
from services.gateway.metrics import GatewayMetrics
from services.gateway.mirrors import Mirror
from services.gateway.models import Models
from services.gateway.records import Records
from services.gateway.signing import Signer
from shared import topology
from shared.blobs import BlobStore
from shared.bus import Bus
from shared.contracts.checkpoints import CheckpointRecord
from shared.contracts.policies import PolicyRef
from shared.contracts.sessions import RunActivity, SamplerRecord, SessionRecord
from shared.contracts.tenants import Audited, TenantLimits
from shared.contracts.training import RunRecord
from shared.tasks import Tasks


@dataclass(frozen=True)
class Gateway:
    """The parts of a gateway. None holds anything that another gateway could not find out."""

    config: GatewayConfig
    bus: Bus
    blobs: BlobStore
    tasks: Tasks
    callers: Callers
    signer: Signer
    hub: Hub
    records: Records
    models: Models
    in_flight: InFlight
    metrics: GatewayMetrics
    runs: Mirror[RunRecord]
    sessions: Mirror[SessionRecord]
    samplers: Mirror[SamplerRecord]
    run_activity: Mirror[RunActivity]
    checkpoints: Mirror[CheckpointRecord]
    inflight_policies: Mirror[PolicyRef]
    compared: dict[str, None] = field(default_factory=dict)
    """Blobs that were found to be what was written, oldest first."""
    activity: dict[str, float] = field(default_factory=dict)
    """When it was last written down that a run was used."""

    @property
    def closing(self) -> bool:
        """Whether this gateway is being stopped."""
        return self.hub.closing.is_set()

    def limits_of(self, tenant: str) -> TenantLimits:
        """What a tenant may have at the same time: its record's limits, and the configuration's where it has none."""
        own = self.callers.limits(tenant)
        config = self.config
        return TenantLimits(
            runs=config.tenant_runs if own.runs is None else own.runs,
            requests=config.tenant_requests if own.requests is None else own.requests,
            queued_tokens=config.tenant_queued_tokens if own.queued_tokens is None else own.queued_tokens,
            checkpoint_bytes=config.tenant_checkpoint_bytes if own.checkpoint_bytes is None else own.checkpoint_bytes,
        )

    async def audit(self, call: Call, event: str, **details: Any) -> None:
        """Write down what a caller did, or was refused, `event` being `<resource>_<action>`."""
        caller = call.caller
        entry = Audited(at=time.time(), owner=caller.tenant, event=event, details={"key": caller.key_id, **details})
        await self.bus.publish(topology.AUDITS, entry, owner=caller.tenant)


@dataclass(frozen=True)
class Call:
    """A request, read and decoded."""

    caller: Caller
    """Whose it is. Of a public endpoint: nobody's."""
    body: Any
    """Of the type that the endpoint declares."""
    path: Mapping[str, str]
    """The parts of the path that the endpoint leaves open."""
    scope: Mapping[str, Any]
    """As ASGI has it."""
    headers: Mapping[bytes, bytes]
    """Names in lower case."""

    @cached_property
    def query(self) -> dict[str, str]:
        """What stands behind the question mark; of a repeated name the last."""
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1"), keep_blank_values=True))

    def header(self, name: bytes) -> str:
        """A header's text; empty: there is none."""
        return self.headers.get(name, b"").decode("latin-1")


@dataclass(frozen=True)
class Answer:
    """An answer that is not simply JSON with status 200."""

    content: bytes = b""
    media_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] | None = None
    chunks: AsyncIterator[bytes] | None = None
    """Sent behind `content` as they come. If they fail half-way, the connection is cut: the client sees that it has
    not got all. With a `Content-Length` among the headers, as long as that says."""


NOTHING = Answer(status=204)
"""For what has no answer but that it was done."""

Handle = Callable[[Gateway, Call], Awaitable[Any]]
"""Returns an `Answer`, or what is encoded as JSON. Raises what `services.gateway.errors` lists."""


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    """Below `/api/v1/`; `{name}` and `{name:path}` are open."""
    handle: Handle
    body: Any = None
    """The type of its JSON body; `bytes`: as it came, only decompressed; None: it has none that matters."""
    public: bool = False
    """Answered without a key."""
