"""Files encrypted with age (age-encryption.org/v1) for those who may read them."""

from __future__ import annotations

from typing import Any, TypeAlias

import pyrage
from pyrage import ssh, x25519

from shared.errors import UserError

SUFFIX = ".age"
MOST_RECIPIENTS = 10
_CHUNK = 1 << 16

Recipient: TypeAlias = Any
"""Of pyrage, which says nothing of its types: x25519's, or ssh's."""


def recipients_of(keys: list[str]) -> list[Recipient]:
    """The recipients whose public keys these are. Raise `UserError`, which never repeats what may be a secret."""
    if len(keys) > MOST_RECIPIENTS:
        raise UserError(f"{len(keys)} recipients were given: encrypt for {MOST_RECIPIENTS} at most")
    return [_recipient(number, key.strip()) for number, key in enumerate(keys, 1)]


def encrypted(content: bytes, recipients: list[Recipient]) -> bytes:
    """Encrypt for all of the recipients. Takes time, but lets other threads run."""
    written = _Writer()
    # Not `pyrage.encrypt`, which holds the interpreter until it is done: half a second for an adapter of 250 MB.
    pyrage.encrypt_io(_Reader(content), written, recipients)
    return bytes(written.content)


def _recipient(number: int, key: str) -> Recipient:
    if key.upper().startswith("AGE-SECRET-KEY-"):
        raise UserError(f"recipient {number} is a secret key: give the public one, which begins with age1, and keep it")
    kind = ssh.Recipient if key.startswith("ssh-") else x25519.Recipient
    try:
        return kind.from_str(key)
    except pyrage.RecipientError:
        raise UserError(
            f"recipient {number} is no public key for age: give one that begins with age1, ssh-ed25519 or ssh-rsa"
        ) from None


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content, self._place = memoryview(content), 0

    def read(self, size: int = _CHUNK) -> bytes:
        chunk = bytes(self._content[self._place : self._place + size])
        self._place += len(chunk)
        return chunk


class _Writer:
    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, chunk: bytes) -> int:
        self.content += chunk
        return len(chunk)

    def flush(self) -> None:
        """There is nothing to flush."""
