"""The ids that clients and gateway give each other. Pure.

| id | form |
|---|---|
| session | `s-` and letters, digits |
| run (`model_id`) | `SESSION:train:N` |
| sampler (`sampling_session_id`) | `SESSION:sample:N` |
| request for an operation | `SESSION.train-N.SEQ` |
| request for a sample | `SESSION.sample-N.SEQ` |
| sampled sequence | REQUEST`/I` |
| checkpoint | `tinker://RUN/weights/NAME`, or `sampler_weights`, `external_weights` |

Ids of requests follow from what is asked, so that a repeated submission is the same request. Each id begins with its
session, whose record says whose it is.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from services.gateway.errors import NotFound
from shared.contracts.checkpoints import CHECKPOINT_NAME, CheckpointKey, CheckpointKind
from shared.errors import UserError

_SESSION = re.compile(r"s-[A-Za-z0-9-]{1,64}")
_OWNED = re.compile(r"(s-[A-Za-z0-9-]{1,64}):(train|sample):(0|[1-9][0-9]{0,18})")
_REQUEST = re.compile(r"(s-[A-Za-z0-9-]{1,64})\.(train|sample)-(0|[1-9][0-9]{0,18})\.(0|[1-9][0-9]{0,18})")
_NAME = re.compile(CHECKPOINT_NAME)

FOLDERS: Mapping[str, CheckpointKind] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
"""What stands in paths and checkpoint ids for each kind of checkpoint."""
FOLDER_OF: Mapping[CheckpointKind, str] = {kind: folder for folder, kind in FOLDERS.items()}
SCHEME = "tinker://"


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


def parse_path(text: str) -> CheckpointKey:
    """The checkpoint that a `tinker://` path names. Raise `UserError` for what is no such path."""
    parts = text.removeprefix(SCHEME).split("/")
    if not text.startswith(SCHEME) or len(parts) != 3 or parts[1] not in FOLDERS or not parts[0]:
        raise UserError(
            f"{shown(text)} is no path of a checkpoint: give tinker://RUN/weights/NAME, or sampler_weights or "
            "external_weights in the middle"
        )
    return CheckpointKey(run=parts[0], kind=FOLDERS[parts[1]], name=check_name(parts[2]))


def parse_checkpoint_id(run: str, text: str) -> CheckpointKey:
    """The checkpoint of a run that an id like `weights/NAME` names. Raise `NotFound` for what is none."""
    folder, _, name = text.partition("/")
    if folder not in FOLDERS or not _NAME.fullmatch(name):
        raise NotFound(f"there is no checkpoint {shown(text)} of {shown(run)}")
    return CheckpointKey(run=run, kind=FOLDERS[folder], name=name)


def checkpoint_id(key: CheckpointKey) -> str:
    """As clients name it within its run."""
    return f"{FOLDER_OF[key.kind]}/{key.name}"


def checkpoint_path(key: CheckpointKey) -> str:
    """As clients name it everywhere."""
    return f"{SCHEME}{key.run}/{checkpoint_id(key)}"


def check_name(name: str) -> str:
    """The checkpoint's name itself. Raise `UserError` for what could be a path, or is too long."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"checkpoint name {shown(name)} cannot be used: up to 127 letters, digits, '.', '_' and '-', beginning "
            "with a letter or digit"
        )
    return name


def shown(text: str, most: int = 120) -> str:
    """A text that came from outside, for a message."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


def _owned(text: str, kind: str, what: str) -> Owned:
    found = _OWNED.fullmatch(text)
    if found is None or found[2] != kind:
        raise NotFound(f"there is no {what} {shown(text)}")
    return Owned(found[1], kind, int(found[3]))
