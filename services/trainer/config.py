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
    max_pass_tokens: int = 8192
    """Tokens in one forward and backward pass. A larger operation goes through several."""
    tenant_weights: dict[str, Weight] = {}
    """Shares of the passes among the owners of runs that wait, by owner; 1 for one that is not named."""
    max_backlog: int = 64
    """Operations of one run taken from its log ahead of time; the rest stays there."""
    snapshot_operations: int = 60
    """Operations after which a run's state is written down, so that recovery replays no more than these."""
    snapshot_seconds: float = 120.0
    """Time after which it is written down anyhow."""
    threads: int = 0
    """CPU threads of the engine. 0: as many as cores."""
