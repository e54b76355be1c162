"""What clients look up and manage beside training and sampling: runs, checkpoints, sessions, usage, the audit log."""

from collections.abc import Sequence

from services.gateway.context import Endpoint
from services.gateway.rest import audit, billing, checkpoints, copies, downloads, identity, runs, sessions, traces

ENDPOINTS: Sequence[Endpoint] = tuple(
    endpoint
    for module in (runs, checkpoints, sessions, copies, downloads, traces, billing, audit, identity)
    for endpoint in module.ENDPOINTS
)
