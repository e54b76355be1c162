"""Configuration of a service: a struct, filled from a TOML file and the environment, at `__main__` only.

`OPENRL_<SERVICE>_<FIELD>` in the environment goes before `OPENRL_MESH_<FIELD>`, which sets what every service has for
all services at once, and that before the file. Unknown keys in any of them are errors, since they are most likely
misspelt ones.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from shared.errors import UserError

MESH = "OPENRL_MESH_"


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every service is told."""

    nats_url: str = "nats://127.0.0.1:4222"
    """Where the bus is; several servers with commas between. `tls://` asks for encryption."""
    nats_user: str = ""
    nats_password: str = ""
    """Empty: the bus asks for none."""
    nats_credentials: str = ""
    """File with a JWT and its seed, where the bus has accounts."""
    nats_ca: str = ""
    """File with the certificates that the bus's own is checked by. Empty: those of the operating system."""
    stream_replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    """Servers of a cluster that keep each stream and bucket. Never lowers what is there."""
    blob_url: str = ".openrl/blobs"
    """Directory or bucket URL of the blob store."""
    replica: str = ""
    """Name of this process. Empty: service, host and process id."""
    host: str = "127.0.0.1"
    """Address to serve /healthz and /metrics on. Loopback unless asked otherwise."""
    metrics_port: int = 0
    """0: a free port; the `replicas` bucket says which."""
    log_level: str = "INFO"
    drain_seconds: float = 8.0
    """How long running work may take to finish after SIGTERM; then it is handed back."""


ConfigT = TypeVar("ConfigT", bound=ServiceConfig)


def load(kind: type[ConfigT], service: str, path: Path | None, environ: Mapping[str, str] | None = None) -> ConfigT:
    """Read a service's configuration. Raise `UserError` that names the key and where it stands."""
    values = _from_file(path) if path else {}
    values |= _from_environment(kind, service, os.environ if environ is None else environ)
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"configuration of {service}: {error} (known keys: {', '.join(_fields(kind))})") from None


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"configuration file {path} is not valid TOML: {error}") from None


def _from_environment(kind: type[ConfigT], service: str, environ: Mapping[str, str]) -> dict[str, Any]:
    common = _prefixed(MESH, "every service", ServiceConfig, environ)
    return common | _prefixed(f"OPENRL_{service.upper()}_", service, kind, environ)


def _prefixed(prefix: str, who: str, kind: type[ServiceConfig], environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, text in environ.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix).lower()
        if name not in _fields(kind):
            raise UserError(f"environment variable {key} is unknown: {who} has {', '.join(_fields(kind))}")
        values[name] = _parsed(text)
    return values


def _parsed(text: str) -> Any:
    """A list or table is written as JSON; everything else is taken as it stands and converted to the field's type."""
    if text[:1] in ("{", "["):
        return msgspec.json.decode(text)
    return text


def _fields(kind: type[ServiceConfig]) -> tuple[str, ...]:
    return kind.__struct_fields__
