"""Who the caller is: tokens in place of keys, and what is known of a key."""

from __future__ import annotations

import time

import msgspec
from msgspec import Struct

from services.gateway.auth import ORGANIZATION
from services.gateway.context import NOTHING, Answer, Call, Endpoint, Gateway
from shared import topology

_DIGITS = 13
"""Of the digest, in hexadecimal, that name a key: as a number they are exact in every language."""


class Token(Struct, frozen=True):
    """A short-lived token."""

    jwt: str


class Named(Struct, frozen=True):
    """An organization."""

    name: str


class User(Struct, frozen=True):
    """A user; without addresses, the key's name."""

    email: str


class Details(Struct, frozen=True):
    """To whom a key belongs."""

    org_details: Named
    user_details: User


class ApiKey(Struct, frozen=True):
    """What is known of a key."""

    key_id: int
    name: str
    note: str
    details: Details


async def token(gateway: Gateway, call: Call) -> Token:
    """A token in place of the caller's key."""
    return Token(gateway.callers.token(call.caller))


async def api_key(_: Gateway, call: Call) -> ApiKey:
    """The key that the caller uses."""
    caller = call.caller
    owner = Details(Named(ORGANIZATION), User(caller.tenant))
    return ApiKey(int(caller.digest[:_DIGITS], 16), caller.key_id, f"tenant {caller.tenant}", owner)


async def revoke(gateway: Gateway, call: Call) -> Answer:
    """Revoke the key that the caller uses."""
    table = gateway.bus.table(topology.KEYS)
    while (entry := await table.get(call.caller.digest)) is not None and entry.value.revoked is None:
        revoked = msgspec.structs.replace(entry.value, revoked=time.time())
        if await table.update(call.caller.digest, revoked, entry.revision) is not None:
            await gateway.audit(call, "key_revoked")
    return NOTHING


ENDPOINTS = (
    Endpoint("POST", "auth/token", token),
    Endpoint("GET", "auth/apikey/me", api_key),
    Endpoint("DELETE", "auth/apikey/me", revoke),
)
