"""API keys of a mesh: made, listed, revoked; and the one that a single user of one machine needs not make."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from services.local.config import Paths
from services.local.health import replicas
from shared import topology
from shared.bus import Bus
from shared.contracts.base import NAME_PATTERN
from shared.contracts.replicas import HTTP, ReplicaRecord
from shared.contracts.tenants import DEFAULT_TENANT, KeyRecord, TenantRecord
from shared.errors import UserError

PREFIX = "tml-"
"""Clients take no others."""
SECRET_BYTES = 32
DEFAULT_LABEL = "single user of this machine"
DAY = 86400.0


async def create(
    bus: Bus,
    tenant: str,
    *,
    label: str = "",
    project: str | None = None,
    admin: bool = False,
    days: float | None = None,
) -> tuple[str, KeyRecord]:
    """Make a key, and its tenant if there is none. Returns the key, which is kept nowhere, and its record."""
    key = new_key()
    expires = None if days is None else time.time() + days * DAY
    record = await _register(bus, key, tenant, label=label, project=project, admin=admin, expires=expires)
    return key, record


async def listed(bus: Bus) -> list[KeyRecord]:
    """All keys, oldest first."""
    return sorted((entry.value for entry in await bus.table(topology.KEYS).items()), key=lambda key: key.created)


async def revoke(bus: Bus, key_id: str) -> KeyRecord:
    """Have a key be refused from now on. Raise `UserError` if there is none of this id."""
    table = bus.table(topology.KEYS)
    for entry in await table.items():
        if entry.value.id == key_id:
            revoked = msgspec.structs.replace(entry.value, revoked=entry.value.revoked or time.time())
            await table.put(entry.key, revoked)
            return revoked
    raise UserError(f"there is no key {key_id!r}: `openrl key list` shows their ids")


async def ensure_default(bus: Bus, paths: Paths) -> str:
    """The key of the single user of this machine, known to the mesh. A revoked one is replaced."""
    path = paths.api_key
    key = path.read_text().strip() if path.exists() else ""
    entry = await bus.table(topology.KEYS).get(_digest(key)) if key else None
    if entry is not None and entry.value.revoked is None:
        return key
    if not key or entry is not None:
        key = new_key()
        write_secret(path, key.encode())
    await _register(bus, key, DEFAULT_TENANT, label=DEFAULT_LABEL, admin=True)
    return key


def ensure_secret(paths: Paths) -> Path:
    """The file with what the gateways of this mesh sign with."""
    if not paths.gateway_secret.exists():
        write_secret(paths.gateway_secret, secrets.token_hex(SECRET_BYTES).encode())
    return paths.gateway_secret


async def gateway_url(bus: Bus) -> str | None:
    """Where clients connect; None while no gateway is there."""
    found = [url for record in (await replicas(bus)).values() if (url := url_of(record)) is not None]
    return found[0] if found else None


def url_of(record: ReplicaRecord) -> str | None:
    """Where clients connect to a replica; None: it is no gateway."""
    ports = [offer.removeprefix(HTTP) for offer in record.offers if offer.startswith(HTTP)]
    return f"http://{record.host}:{ports[0]}" if record.service == "gateway" and ports else None


def client_lines(url: str, key: str) -> Sequence[str]:
    """What to paste into a shell so that programs with the tinker client find this mesh."""
    return (f"export TINKER_BASE_URL={url}", f"export TINKER_API_KEY={key}")


def new_key() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    part.replace(path)


async def _register(
    bus: Bus,
    key: str,
    tenant: str,
    *,
    label: str = "",
    project: str | None = None,
    admin: bool = False,
    expires: float | None = None,
) -> KeyRecord:
    now = time.time()
    try:
        owner = msgspec.convert({"tenant": tenant, "created": now}, TenantRecord)
    except msgspec.ValidationError:
        raise UserError(f"tenant {tenant!r} cannot be used: it must match {NAME_PATTERN}") from None
    await bus.table(topology.TENANTS).create(tenant, owner)
    record = KeyRecord(
        id=f"key-{secrets.token_hex(4)}",
        tenant=tenant,
        created=now,
        label=label,
        project=project,
        admin=admin,
        expires=expires,
    )
    await bus.table(topology.KEYS).put(_digest(key), record)
    return record


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
