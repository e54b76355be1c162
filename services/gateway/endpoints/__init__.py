"""All endpoints, those first that are asked most often."""

from collections.abc import Sequence

from services.gateway.context import Endpoint
from services.gateway.endpoints import clients, futures, sampling, sessions, training, weights
from services.gateway.rest import ENDPOINTS as LOOK_UPS

ENDPOINTS: Sequence[Endpoint] = (
    *futures.ENDPOINTS,
    *sampling.ENDPOINTS,
    *training.ENDPOINTS,
    *weights.ENDPOINTS,
    *sessions.ENDPOINTS,
    *clients.ENDPOINTS,
    *LOOK_UPS,
)
