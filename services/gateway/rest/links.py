"""Links that work without a key, for a while. Whoever has one may follow it, whichever gateway has signed it."""

from __future__ import annotations

import time
from urllib.parse import quote

from services.gateway.context import Call, Gateway
from services.gateway.errors import Forbidden
from services.gateway.signing import Signer

SECONDS = 3600.0
PREFIX = "/api/v1/"
_EXPIRES, _SIGNATURE = "expires", "signature"


def link(gateway: Gateway, call: Call, path: str, expires: float) -> str:
    """A link to a path below the prefix of the API that is good until `expires`, seconds since the epoch."""
    until = str(int(expires))
    signature = gateway.signer.signature(_signed(path, until))
    base = gateway.config.public_url.rstrip("/") or _base(call)
    return f"{base}{PREFIX}{quote(path)}?{_EXPIRES}={until}&{_SIGNATURE}={signature}"


def check(signer: Signer, call: Call, path: str) -> None:
    """Raise `Forbidden` unless the request followed a link to this path that is still good."""
    until, signature = call.query.get(_EXPIRES, ""), call.query.get(_SIGNATURE, "")
    if not signer.is_signature(_signed(path, until), signature):
        raise Forbidden("the link is not one that this mesh has signed: ask for a new one")
    if int(until) < time.time():
        raise Forbidden("the link has expired: ask for a new one")


def _signed(path: str, until: str) -> str:
    return f"link {until} {path}"


def _base(call: Call) -> str:
    server = call.scope.get("server") or ("127.0.0.1", 80)
    host = call.header(b"host") or f"{server[0]}:{server[1]}"
    return f"{call.scope.get('scheme', 'http')}://{host}"
