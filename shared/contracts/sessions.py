"""Sessions of clients, and what they sample from."""

from __future__ import annotations

from typing import Any, Literal

from shared.contracts.base import Contract
from shared.contracts.policies import PolicyRef

SessionEnd = Literal["success", "errored", "interrupted", "lapsed"]
"""How a session ended: as its client said, or `lapsed` when its client has not been heard of for too long."""


class SessionRecord(Contract):
    """One connection of a client's program, from its start to its end; runs and samplers belong to one."""

    session: str
    owner: str
    created: float
    """Seconds since the epoch, as every time here."""
    project: str | None = None
    display_name: str | None = None
    tags: list[str] = []
    user_metadata: dict[str, Any] = {}
    sdk_version: str = ""
    ended: SessionEnd | None = None
    """None: it goes on."""
    ended_at: float | None = None
    end_detail: str | None = None


class Heartbeat(Contract):
    """A session's client is alive. The entry goes away by itself, and with it, after a while, the session."""

    at: float


class SamplerRecord(Contract):
    """What a client samples from, under an id that it keeps: `SESSION:sample:N`."""

    sampler: str
    session: str
    owner: str
    base_model: str
    policy: PolicyRef | None = None
    """None: the base model. With `inflight`, the oldest policy that may answer."""
    path: str | None = None
    """The checkpoint that it was made from, as `tinker://…`."""
    inflight: bool = False
    """Answered by the newest policy that the run has published for sampling in flight, rather than by `policy`."""
    created: float = 0.0
    model_name: str = ""
    """How its client calls the base model: by this name, an alias, or a directory. Empty: by this name."""
    clients: int = 0
    """Copies of the client in other processes that have been given a number."""


class RunActivity(Contract):
    """When somebody last asked something of a run."""

    at: float
