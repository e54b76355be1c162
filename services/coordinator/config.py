"""Configuration of a coordinator."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shared.config import ServiceConfig


class CoordinatorConfig(ServiceConfig, frozen=True, kw_only=True):
    """A coordinator drives jobs; several share them by lease."""

    metrics_dir: str = ".openrl/jobs"
    """A file of metrics for each job, one JSON object a line."""
    max_jobs: int = 16
    """Jobs driven at the same time; others wait, by priority."""
    max_failed_groups: int = 8
    """Groups that may fail one after another; then the job fails with the last one's reason."""
    group_patience_s: float = 3600.0
    """A group that has not come back after this long counts as failed, and another one is asked for."""
    group_window: Annotated[int, msgspec.Meta(ge=1)] = 256
    """Training groups of a job that may be out at the same time; the next ones are asked for as they come back."""
    evaluation_window: Annotated[int, msgspec.Meta(ge=1)] = 128
    """The same for the held-out groups of its evaluations."""
    keep_policies: int = 2
    """Newest versions of a job's policy that are kept beyond those still in use."""
    janitor_seconds: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """Between two looks at what clients' sessions have left behind."""
    silence_seconds: float = 60.0
    """A session whose last heartbeat has expired is seen so for this long before it lapses: after the mesh was away,
    its client may be about to be heard of again."""
    session_grace_seconds: float = 600.0
    """How long runs and samplers of a session that has ended can still be asked for."""
    unnamed_policy_seconds: float = 3600.0
    """How long a policy stays that no sampler and no checkpoint names: requests that are on their way may."""
