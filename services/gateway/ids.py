"""The ids that clients and gateway give each other. Pure.

| id | form |
|---|---|
| session | `s-` and letters, digits |
| run (`model_id`) | `SESSION:train:N` |
| sampler (`sampling_session_id`) | `SESSION:sample:N` |
| request for an operation | `SESSION.train-N.SEQ` |
| request for a sample | `SESSION.sample-N.SEQ` |
| sampled sequence | REQUEST`/I` |

Checkpoints have paths (`shared.checkpoints`). Ids of requests follow from what is asked, so that a repeated submission
is the same request. Each id begins with its session, whose record says whose it is.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from services.gateway.errors import NotFound

_SESSION = re.compile(r"s-[A-Za-z0-9-]{1,64}")
_OWNED = re.compile(r"(s-[A-Za-z0-9-]{1,64}):(train|sample):(0|[1-9][0-9]{0,18})")
_REQUEST = re.compile(r"(s-[A-Za-z0-9-]{1,64})\.(train|sample)-(0|[1-9][0-9]{0,18})\.(0|[1-9][0-9]{0,18})")


@dataclass(frozen=True, slots=True)
class Owned:
    """A run's or a sampler's id, or a request's, in parts."""

    session: str
    kind: str
    """`train` or `sample`."""
    number: int
    seq: int = 0
    """Of a request."""

    @property
    def id(self) -> str:
        """The run or sampler."""
        return f"{self.session}:{self.kind}:{self.number}"

    def request(self, seq: int) -> str:
        """The id of one of its requests."""
        return f"{self.session}.{self.kind}-{self.number}.{seq}"


def new_session() -> str:
    """An id that nobody can guess."""
    return f"s-{secrets.token_hex(12)}"


def check_session(text: str) -> str:
    """The session's id itself. Raise `NotFound` for what cannot be one."""
    if not _SESSION.fullmatch(text):
        raise NotFound(f"there is no session {shown(text)}")
    return text


def parse_run(text: str) -> Owned:
    """Raise `NotFound` for what is no run's id."""
    return _owned(text, "train", "training run")


def parse_sampler(text: str) -> Owned:
    """Raise `NotFound` for what is no sampler's id."""
    return _owned(text, "sample", "sampling session")


def parse_request(text: str) -> Owned:
    """Raise `NotFound` for what is no request's id."""
    found = _REQUEST.fullmatch(text)
    if found is None:
        raise NotFound(f"there is no request {shown(text)}")
    return Owned(found[1], found[2], int(found[3]), int(found[4]))


def shown(text: str, most: int = 120) -> str:
    """A text that came from outside, for a message."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


def _owned(text: str, kind: str, what: str) -> Owned:
    found = _OWNED.fullmatch(text)
    if found is None or found[2] != kind:
        raise NotFound(f"there is no {what} {shown(text)}")
    return Owned(found[1], kind, int(found[3]))
