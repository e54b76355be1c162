"""Configuration of the reward service."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shared.config import ServiceConfig

Positive = Annotated[int, msgspec.Meta(ge=1)]


class RewardConfig(ServiceConfig, frozen=True, kw_only=True):
    """What the reward service is told."""

    concurrency: Positive = 16
    """Groups in work at the same time."""
    processes: Positive = 4
    """Processes that score, which is also how many episodes are scored at the same time."""
    plugins: list[str] = []
    """Rewards of one's own as `name=module:attribute`, beside those that installed packages register."""
    memory_mib: Annotated[int, msgspec.Meta(ge=0)] = 4096
    """Address space of each process. 0: no limit."""
