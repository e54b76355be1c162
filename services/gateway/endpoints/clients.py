"""What every client asks at its start: flags, and what is served here. And what it tells: its telemetry."""

from __future__ import annotations

from typing import Any

import msgspec

from services.gateway.context import Answer, Call, Endpoint, Gateway
from shared.contracts.base import Strict

REFRESH_SECONDS = 300
CANCELS_AT_ONCE = 64


class ConfigRequest(Strict):
    """Asks for flags."""

    sdk_version: str


async def config(gateway: Gateway, _: Call) -> Answer:
    """The flags of the client. Those that are not named keep the client's defaults.

    `custom_loss_server_side` stays off: custom losses run in the client, with its own code.
    """
    settings = gateway.config
    flags = {
        "pjwt_auth_enabled": settings.exchange_keys,
        "parallel_fwdbwd_chunks": True,
        "proto_compress_fwdbwd": settings.compress_training_data,
        "sample_use_retrieve_futures": settings.poll_for_many,
        "sample_join_sampling_session": True,
        "custom_loss_server_side": False,
    }
    # Clients ask on a connection that they use for nothing else, and leave open.
    return Answer(msgspec.json.encode(flags), headers={"Connection": "close"})


async def dynamic_config(_: Gateway, __: Call) -> dict[str, Any]:
    """The flags that a client asks for again and again."""
    return {
        "refresh_interval_sec": REFRESH_SECONDS,
        "sample_cancel_enabled": True,
        "sample_cancel_max_batch_size": CANCELS_AT_ONCE,
    }


async def telemetry(_: Gateway, __: Call) -> dict[str, str]:
    """What clients tell of themselves is taken and not kept: it is nobody's business here."""
    return {"status": "accepted"}


async def health(_: Gateway, __: Call) -> dict[str, str]:
    """That the gateway answers."""
    return {"status": "ok"}


async def capabilities(gateway: Gateway, _: Call) -> dict[str, Any]:
    """The models that are served, each under all its names."""
    models = gateway.models
    aliases = [(alias, model) for alias, model in models.aliases.items() if model in models.names]
    names = [*((model, model) for model in models.names), *sorted(aliases)]
    return {
        "supported_models": [
            {
                "model_name": name,
                "max_context_length": models.context(model),
                "trainable": models.has("trainer", model),
                "sampleable": models.has("sampler", model),
            }
            for name, model in names
        ]
    }


ENDPOINTS = (
    Endpoint("POST", "telemetry", telemetry, body=msgspec.Raw),
    Endpoint("POST", "client/config", config, body=ConfigRequest),
    Endpoint("POST", "client/dynamic_config", dynamic_config, body=ConfigRequest),
    Endpoint("GET", "get_server_capabilities", capabilities),
    Endpoint("GET", "healthz", health, public=True),
)
