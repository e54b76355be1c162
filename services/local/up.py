"""What `openrl up` was asked for, and what follows from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.local import autoscale, prometheus
from services.local.config import Paths, ServiceCommand, mesh_commands
from services.local.placed import Placeable
from services.local.prometheus import Prometheus


@dataclass(frozen=True)
class Up:
    """A mesh to be started."""

    paths: Paths
    models: Mapping[str, Path]
    """Directories of the models to serve."""
    named: tuple[str, ...]
    """Those that were named; none: all that are registered."""
    port: int
    gateway_port: int
    device: str
    engine: str
    """The samplers'."""
    prometheus_port: int | None
    """None: no Prometheus."""
    autoscale: Literal["no", "dry-run", "yes"]

    @property
    def placeable(self) -> Placeable | None:
        """What the autoscaler may place here."""
        return Placeable(self.models, self.device, self.engine) if self.autoscale == "yes" else None

    def commands(self, beside: Prometheus | None) -> list[ServiceCommand]:
        """The services. `beside` is the Prometheus that runs with them."""
        commands = mesh_commands(
            self.paths,
            self.models,
            device=self.device,
            engine=self.engine,
            gateway_port=self.gateway_port,
            placed=self.placeable is not None,
        )
        if beside is not None:
            commands += prometheus.gpu_commands()
            if self.autoscale != "no":
                dry_run = self.autoscale == "dry-run"
                commands.append(autoscale.command(self.models, beside.url, dry_run=dry_run))
        return commands

    def argv(self) -> list[str]:
        """The command that starts the same in the foreground."""
        options = {
            "--data": str(self.paths.root),
            "--port": str(self.port),
            "--gateway-port": str(self.gateway_port),
            "--device": self.device,
            "--sampler-engine": self.engine,
        }
        own = [part for option in options.items() for part in option]
        if self.prometheus_port is not None:
            own += ["--prometheus", "--prometheus-port", str(self.prometheus_port)]
        if self.autoscale != "no":
            own += ["--autoscale", *(["--dry-run"] if self.autoscale == "dry-run" else [])]
        named = [argument for name in self.named for argument in ("--model", name)]
        return [sys.executable, "-m", "services.local", "up", *own, *named]
