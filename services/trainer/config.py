"""Configuration of a trainer."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shared.config import ServiceConfig

Weight = Annotated[float, msgspec.Meta(ge=0.001, le=1000)]


class TrainerConfig(ServiceConfig, frozen=True, kw_only=True):
    """One trainer holds one frozen base model and the runs that it leases."""

    base_model: str
    """Name under which runs ask for it."""
    model_dir: str
    """Directory with its files, or a name on the Hugging Face hub."""
    engine: Literal["torch"] = "torch"
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto`: a GPU if there is one."""
    max_runs: int = 256
    """Runs held at the same time; others wait for another trainer."""
    max_resident_runs: Annotated[int, msgspec.Meta(ge=1)] = 64
    """Of these, runs whose state is on the device; the least recently used others are parked in host memory."""
    max_resident_bytes: int = 0
    """Bytes of their state. 0: as much as the device has room for."""
    max_host_runs: Annotated[int, msgspec.Meta(ge=0)] = 64
    """Runs parked in host memory; the least recently used others are only in the blob store."""
    park_seconds: float = 60.0
    """A run without work for so long is parked."""
    evict_seconds: float = 600.0
    """A run without work for so long leaves host memory too. It comes back by itself before its next operation."""
    max_pass_tokens: int = 8192
    """Tokens in one forward and backward pass. A larger operation goes through several."""
    tenant_weights: dict[str, Weight] = {}
    """Shares of the passes among the owners of runs that wait, by owner; 1 for one that is not named."""
    recompute_tokens: int | None = None
    """Passes of more tokens than this keep only the hidden states between layers and compute the rest again on the way
    back: less memory for long sequences, a third more work. None: never. Not for Gemma 2 and 3."""
    max_backlog: int = 64
    """Operations of one run taken from its log ahead of time; the rest stays there."""
    missing_seconds: float = 300.0
    """How long a run waits for an operation that has not come though later ones have. Then the run fails."""
    snapshot_operations: int = 60
    """Operations after which a run's state is written down, so that recovery replays no more than these."""
    snapshot_seconds: float = 120.0
    """Time after which it is written down anyhow."""
    threads: int = 0
    """CPU threads of the engine. 0: as many as cores."""
