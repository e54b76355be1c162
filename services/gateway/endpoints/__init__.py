"""All endpoints, those first that are asked most often."""

from collections.abc import Sequence

from services.gateway.context import Endpoint
from services.gateway.endpoints import clients, sessions

ENDPOINTS: Sequence[Endpoint] = (
    *sessions.ENDPOINTS,
    *clients.ENDPOINTS,
)
