"""Configuration of the GPU exporter."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shared.config import ServiceConfig


class GpuExporterConfig(ServiceConfig, frozen=True, kw_only=True):
    """One exporter for each machine. Without a GPU it exports nothing."""

    read_seconds: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Time between two readings. The driver averages utilisation over a sixth of a second up to a second."""
    hostname: str = ""
    """Label `Hostname`. Empty: the machine's own name."""
