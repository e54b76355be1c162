"""The answers to look-ups, as the SDK's types have them; times are RFC 3339 in UTC."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

from shared.checkpoints import id_of, path_of
from shared.contracts.checkpoints import CheckpointKind, CheckpointRecord

DEFAULT_PROJECT = "default"
"""Where sessions belong that name no project."""


class Cursor(Struct, frozen=True):
    """Where a page stands in the whole list."""

    offset: int
    limit: int
    total_count: int


class Checkpoint(Struct, frozen=True):
    """A checkpoint."""

    checkpoint_id: str
    checkpoint_type: CheckpointKind
    time: datetime
    tinker_path: str
    size_bytes: int
    public: bool
    user_metadata: dict[str, str] | None
    expires_at: datetime | None


class Checkpoints(Struct, frozen=True):
    """A list of checkpoints, newest first."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(Struct, frozen=True):
    """A run."""

    training_run_id: str
    base_model: str
    model_owner: str
    lora_rank: int
    last_request_time: datetime
    last_checkpoint: Checkpoint | None
    last_sampler_checkpoint: Checkpoint | None
    user_metadata: dict[str, str] | None
    is_lora: bool = True
    corrupted: bool = False


class TrainingRuns(Struct, frozen=True):
    """A page of runs, newest first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


class WeightsInfo(Struct, frozen=True):
    """What one needs to know to load a checkpoint."""

    base_model: str
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    is_lora: bool = True


class Copied(Struct, frozen=True):
    """Where a copy is."""

    tinker_path: str


class Urls(Struct, frozen=True):
    """Links to files."""

    urls: dict[str, str]
    expires: datetime


class Sampler(Struct, frozen=True):
    """What a client samples from."""

    sampler_id: str
    base_model: str
    model_path: str | None


class Session(Struct, frozen=True):
    """A session with what belongs to it."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None
    display_name: str | None


class Sessions(Struct, frozen=True):
    """Ids of sessions, newest first."""

    sessions: list[str]


def at(seconds: float) -> datetime:
    """A time since the epoch for an answer."""
    return datetime.fromtimestamp(seconds, UTC)


def metadata_of(given: Mapping[str, Any]) -> dict[str, str] | None:
    """Users' metadata as texts, which is all that clients read back; None: there is none."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()} or None


def checkpoint_of(record: CheckpointRecord) -> Checkpoint:
    """A checkpoint for clients."""
    return Checkpoint(
        checkpoint_id=id_of(record.key),
        checkpoint_type=record.key.kind,
        time=at(record.created),
        tinker_path=path_of(record.key),
        size_bytes=record.size,
        public=record.public,
        user_metadata=metadata_of(record.user_metadata),
        expires_at=None if record.expires is None else at(record.expires),
    )
