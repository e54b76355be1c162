"""Tenants, their keys, their limits, and what they used."""

from __future__ import annotations

from typing import Any, Literal

from shared.contracts.base import Contract, Name

DEFAULT_TENANT = "default"
"""Owner of what is done without a key of anybody's: jobs published on the bus, the single user of one machine."""


class TenantLimits(Contract):
    """What a tenant may have at the same time. None: no limit of its own, only the gateway's."""

    runs: int | None = None
    requests: int | None = None
    """Training operations and requests for samples that are not answered yet."""
    queued_tokens: int | None = None
    """Tokens in these."""
    checkpoint_bytes: int | None = None


class TenantRecord(Contract):
    """Who owns runs, jobs, checkpoints and keys."""

    tenant: Name
    created: float
    limits: TenantLimits = TenantLimits()


class KeyRecord(Contract):
    """An API key. The bucket's key is the SHA-256 of the whole API key, which itself is kept nowhere."""

    id: str
    """Names the key where people see it."""
    tenant: str
    created: float
    label: str = ""
    project: str | None = None
    """Where sessions of this key belong unless they say otherwise."""
    admin: bool = False
    """May read the audit log and the usage of all tenants."""
    expires: float | None = None
    revoked: float | None = None
    """When it was revoked; None: it is good."""


UsageKind = Literal["training", "prompt", "sampled"]


class UsageRecorded(Contract):
    """Tokens that a replica has processed for one owner, session and model (event).

    What a killed replica had not yet told, some seconds of work, is missing; nothing is counted twice.
    """

    owner: str
    kind: UsageKind
    tokens: int
    begin: float
    """Seconds since the epoch; `begin` and `end` lie in one UTC hour."""
    end: float
    base_model: str = ""
    session: str = ""
    """Empty: of a job."""
    cached: bool = False
    """Prompt tokens that were not computed, since a cache had them."""


class Audited(Contract):
    """Somebody did, or was refused, something that an administrator may have to explain (event)."""

    at: float
    owner: str
    event: str
    """`<resource>_<action>`, as `checkpoint_published`."""
    details: dict[str, Any] = {}
    """Who did it, what it was about."""
