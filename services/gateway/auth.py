"""Who asks: API keys and the short-lived tokens made from them.

Keys are kept by their SHA-256 only. Keys and tenants are followed, so that a revocation acts within moments.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

from services.gateway.errors import Unauthorized
from services.gateway.mirrors import Mirror
from services.gateway.signing import Signer
from shared import topology
from shared.bus import Bus
from shared.contracts.tenants import KeyRecord, TenantLimits, TenantRecord
from shared.tasks import Tasks

JWT_BEGINS = "eyJ"
MOST_REMEMBERED = 10_000
ORGANIZATION = "openrl"
"""Everybody of a mesh belongs to it."""
USER_URN = "tml:organization_user:"
"""What stands before a tenant's name where clients name users."""
_HOW = "set TINKER_API_KEY to a key that `openrl key create` made"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    tenant: str
    key_id: str = ""
    """Names the key in the audit log."""
    digest: str = ""
    """SHA-256 of the key."""
    project: str | None = None
    admin: bool = False


NOBODY = Caller(tenant="")


class Callers:
    """Knows who asks by the headers of a request."""

    def __init__(self, bus: Bus, signer: Signer) -> None:
        self._keys: Mirror[KeyRecord] = Mirror(bus.table(topology.KEYS))
        self._tenants: Mirror[TenantRecord] = Mirror(bus.table(topology.TENANTS))
        self._signer = signer
        self._digests: dict[bytes, str] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        """The digest that a good token stands for, and until when, in seconds since the epoch."""

    async def start(self, tasks: Tasks) -> None:
        """Know all keys and tenants."""
        await self._keys.start(tasks, "keys")
        await self._tenants.start(tasks, "tenants")

    def caller(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Who asks. Raise `Unauthorized`."""
        credential = headers.get(b"x-api-key") or _bearer(headers.get(b"authorization", b""))
        if not credential:
            raise Unauthorized(f"no API key was given: {_HOW}")
        return self._by_digest(self._digest(credential))

    def by_key(self, key: str) -> Caller:
        """Who has an API key. Raise `Unauthorized`."""
        return self._by_digest(self._digest(key.encode()))

    def token(self, caller: Caller) -> str:
        """A short-lived token in place of a caller's key; it ends with the key."""
        identity = {"sub": user_urn(caller.tenant), "org_id": ORGANIZATION, "email": ""}  # nobody has an address here
        return self._signer.token({**identity, "iss": "passport-openrl", "key": caller.digest})

    def limits(self, tenant: str) -> TenantLimits:
        """A tenant's own limits."""
        found = self._tenants.get(tenant)
        return found.limits if found else TenantLimits()

    def _by_digest(self, digest: str) -> Caller:
        record = self._keys.get(digest)
        if record is None:
            raise Unauthorized(f"the API key is not known: {_HOW}")
        if record.revoked is not None:
            raise Unauthorized(f"the API key {record.id} has been revoked: {_HOW}")
        if record.expires is not None and record.expires <= time.time():
            raise Unauthorized(f"the API key {record.id} has expired: {_HOW}")
        return Caller(record.tenant, record.id, digest, record.project, record.admin)

    def _digest_in(self, token: str) -> str:
        """The digest of the key that a token stands for. Its signature is looked at once."""
        digest, until = self._tokens.get(token, ("", 0.0))
        if until > time.time():
            return digest
        claims = self._signer.claims(token)
        if claims is None:
            raise Unauthorized("the token is not one of this gateway, or is too old: exchange the API key again")
        if len(self._tokens) >= MOST_REMEMBERED:
            self._tokens.clear()
        digest = str(claims.get("key", ""))
        self._tokens[token] = digest, float(claims["exp"])
        return digest

    def _digest(self, credential: bytes) -> str:
        text = credential.decode("latin-1").strip()
        if text.startswith(JWT_BEGINS):
            return self._digest_in(text)
        if (known := self._digests.get(credential)) is not None:
            return known
        if len(self._digests) >= MOST_REMEMBERED:
            self._digests.clear()
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._digests[credential] = digest
        return digest


def user_urn(tenant: str) -> str:
    """How clients name a tenant."""
    return f"{USER_URN}{tenant}"


def _bearer(value: bytes) -> bytes:
    scheme, _, credential = value.partition(b" ")
    return credential if scheme.lower() == b"bearer" else b""
