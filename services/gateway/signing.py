"""Tokens and links that this gateway, or another one with the same secret, recognises as its own."""

from __future__ import annotations

import hmac
import secrets
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt

from shared.errors import UserError
from shared.tables import Table

ALGORITHM = "HS256"
LEAST_SECRET = 32
TOKEN_SECONDS = 900.0
SHARED = "gateway"
"""Key of the shared secret."""


class Signer:
    """Signs with one secret."""

    def __init__(self, secret: bytes) -> None:
        """Raise `UserError` for a secret that could be guessed."""
        if len(secret) < LEAST_SECRET:
            raise UserError(f"the gateway's secret has {len(secret)} bytes: give it {LEAST_SECRET} or more random ones")
        self._secret = secret
        self._is_given = True

    @classmethod
    def of(cls, secret_file: str) -> Signer:
        """A signer with the secret in a file; without a file, see `agree`. Raise `UserError`."""
        if not secret_file:
            signer = cls(secrets.token_bytes(LEAST_SECRET))
            signer._is_given = False
            return signer
        try:
            return cls(Path(secret_file).read_bytes().strip())
        except OSError as error:
            raise UserError(f"secret_file {secret_file} cannot be read: {error.strerror}") from None

    async def agree(self, table: Table[str]) -> None:
        """Unless there is a file: take the secret that the gateways of this mesh share, or make it."""
        if self._is_given:
            return
        await table.create(SHARED, secrets.token_hex(LEAST_SECRET))
        entry = await table.get(SHARED)
        if entry is not None:
            self._secret = bytes.fromhex(entry.value)

    def token(self, claims: dict[str, Any], seconds: float = TOKEN_SECONDS) -> str:
        """A JSON web token that is good for a while."""
        now = int(time.time())
        return jwt.encode({**claims, "iat": now, "exp": now + int(seconds)}, self._secret, ALGORITHM)

    def claims(self, token: str) -> dict[str, Any] | None:
        """What stands in a token; None: it is not ours, or too old."""
        try:
            found: dict[str, Any] = jwt.decode(token, self._secret, [ALGORITHM], options={"require": ["exp", "iat"]})
        except jwt.PyJWTError:
            return None
        return found

    def signature(self, text: str) -> str:
        """For a link: who has not the secret cannot make one for another text."""
        return hmac.new(self._secret, text.encode(), sha256).hexdigest()

    def is_signature(self, text: str, signature: str) -> bool:
        """Whether a signature is that of a text."""
        return hmac.compare_digest(self.signature(text).encode(), signature.encode())
