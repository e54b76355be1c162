"""Configuration of the environment service."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shared.config import ServiceConfig

Positive = Annotated[int, msgspec.Meta(ge=1)]


class EnvironmentConfig(ServiceConfig, frozen=True, kw_only=True):
    """What the environment service is told."""

    models: dict[str, str] = {}
    """Base models by name, each with the directory (or hub name) of its tokenizer."""
    concurrency: Positive = 64
    """Groups in play at the same time. Most of their time is waiting for samplers."""
    plugins: list[str] = []
    """Environments of one's own as `name=module:attribute`, beside those that installed packages register."""
    max_stuck: Positive = 16
    """Calls of one environment that may hang at the same time. With more, its episodes fail at once, until some come
    back: a thread cannot be ended from outside."""
    sample_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    """How long to wait for one answer of the samplers before the group is handed back and tried again."""
