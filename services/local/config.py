"""What runs on one machine: the layout of the data directory and the command of each service."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.local.machine import free_port
from shared.errors import UserError

DEFAULT_PORT = 4222
"""Where NATS clients look when they are told nothing, so programs that publish jobs need no setting."""
GATEWAY_PORT = 8470
"""Where clients find the gateway unless it is told otherwise."""
MAX_SLUG = 48

Setting = str | int | float | bool | Mapping[str, str]


@dataclass(frozen=True)
class Paths:
    """The files of one mesh. Everything that it writes lies below `root`."""

    root: Path
    """Absolute, without links: processes are recognised as ours by this path in their command line."""

    @classmethod
    def of(cls, data: Path) -> Paths:
        """The layout below `data`, which need not be there yet."""
        return cls(data.expanduser().resolve())

    @property
    def lock(self) -> Path:
        """Held, and written with its process id, by the supervisor."""
        return self.root / "lock"

    @property
    def state(self) -> Path:
        """What the supervisor says of itself and its services."""
        return self.root / "state.json"

    @property
    def registry(self) -> Path:
        """Names of models and their directories."""
        return self.root / "models.json"

    @property
    def aliases(self) -> Path:
        """Other names of models."""
        return self.root / "aliases.json"

    @property
    def models(self) -> Path:
        """Models that were fetched rather than found on disk."""
        return self.root / "models"

    @property
    def configs(self) -> Path:
        """One TOML file for each service, written at every start."""
        return self.root / "config"

    @property
    def logs(self) -> Path:
        """One file of JSON lines for each service."""
        return self.root / "logs"

    @property
    def metrics(self) -> Path:
        """One file of JSON lines for each job, written by the coordinator."""
        return self.root / "metrics"

    @property
    def blobs(self) -> Path:
        """The blob store: weights and snapshots."""
        return self.root / "blobs"

    @property
    def api_key(self) -> Path:
        """The API key of this machine's single user."""
        return self.root / "api_key"

    @property
    def gateway_secret(self) -> Path:
        """What the gateway signs tokens and links with."""
        return self.root / "gateway_secret"

    @property
    def nats(self) -> Path:
        """The nats-server's configuration, log and store."""
        return self.root / "nats"

    @property
    def detached(self) -> Path:
        """What a detached supervisor printed."""
        return self.root / "up.out"

    def log(self, name: str) -> Path:
        """Log of a service, or of the supervisor."""
        return self.logs / f"{name}.log"

    def make(self) -> None:
        """Make the directories. Raise `UserError` if that is not possible."""
        try:
            for directory in (self.root, self.configs, self.logs, self.metrics, self.blobs, self.nats):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data directory {self.root} cannot be used ({error.strerror}): choose another with --data"
            ) from None


@dataclass(frozen=True)
class ServiceCommand:
    """A service as a process: `python -m MODULE --config FILE`."""

    name: str
    """Name of the replica, of its log and of its configuration file."""
    service: str
    argv: tuple[str, ...]
    """What to run; `--config FILE` is added."""
    config: Mapping[str, Setting] = field(default_factory=dict)
    """Settings of its own; those that every service has are added by the supervisor."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its own."""


def mesh_commands(
    paths: Paths,
    models: Mapping[str, Path],
    *,
    device: str = "auto",
    engine: str = "torch",
    gateway_port: int | None = None,
    placed: bool = False,
) -> list[ServiceCommand]:
    """The services of a mesh for these models, in the order in which they are shown.

    `engine` is the samplers'. `gateway_port` is where clients connect, 0 a free one. None: there is no gateway.
    `placed`: without samplers and trainers, since an autoscaler starts them.
    """
    directories = {name: str(directory) for name, directory in models.items()}
    commands = [
        service_command("coordinator", config={"metrics_dir": str(paths.metrics)}),
        service_command("environment", config={"models": directories}),
        service_command("reward"),
    ]
    if gateway_port is not None:
        # Chosen once: a gateway that is started again must be where its clients look for it.
        settings: dict[str, Setting] = {"port": gateway_port or free_port(), "secret_file": str(paths.gateway_secret)}
        commands.append(service_command("gateway", config=settings))
    if placed:
        return commands
    for (name, directory), slug in zip(directories.items(), slugs(directories), strict=True):
        own = {"base_model": name, "model_dir": directory, "device": device}
        commands.append(service_command("sampler", f"sampler-{slug}", {**own, "engine": engine}))
        commands.append(service_command("trainer", f"trainer-{slug}", own))
    return commands


def service_command(
    service: str,
    name: str = "",
    config: Mapping[str, Setting] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> ServiceCommand:
    """The command of a service of this package. Its name is the service's unless another is given."""
    argv = (sys.executable, "-m", f"services.{service}")
    return ServiceCommand(name or service, service, argv, config or {}, environment or {})


def slugs(names: Iterable[str]) -> list[str]:
    """For each name a different one that holds only lower-case letters, digits and '-'."""
    found: list[str] = []
    for name in names:
        slug = stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_SLUG] or "model"
        number = 1
        while slug in found:
            number += 1
            slug = f"{stem}-{number}"
        found.append(slug)
    return found


def write_toml(path: Path, settings: Mapping[str, Setting]) -> None:
    """Write settings, plain values first and tables after them, as TOML requires."""
    plain = [f"{key} = {_toml(value)}" for key, value in settings.items() if not isinstance(value, Mapping)]
    tables = [_table(key, value) for key, value in settings.items() if isinstance(value, Mapping)]
    path.write_text("\n".join([*plain, *tables]) + "\n")


def _table(key: str, values: Mapping[str, str]) -> str:
    rows: Sequence[str] = [f"{_toml(name)} = {_toml(value)}" for name, value in values.items()]
    return "\n".join([f"\n[{key}]", *rows])


def _toml(value: str | float) -> str:
    # JSON's strings, numbers and booleans are TOML's too, except that TOML wants DEL escaped and no surrogate pairs.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
