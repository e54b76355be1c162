"""Questions that only an environment or a reward can answer, asked before a job is accepted."""

from __future__ import annotations

from typing import Any

from shared.contracts.base import Contract
from shared.contracts.jobs import FieldError


class CheckEnvironment(Contract):
    """Ask whether an environment has tasks with these parameters (coordinator to environment)."""

    request_id: str
    name: str
    params: dict[str, Any] = {}
    path: str = "environment"
    """Where it stands in the job."""
    seed: int = 0
    held_out: int = 0
    """Held-out tasks that the job's evaluation asks for."""


class CheckReward(Contract):
    """Ask whether a reward can score with these parameters (coordinator to reward)."""

    request_id: str
    name: str
    params: dict[str, Any] = {}
    path: str = "reward"
    """Where it stands in the job."""


class CheckAnswer(Contract, tag_field="kind", tag="check"):
    """All that is wrong, each with its path in the job. Nothing: it can work."""

    request_id: str
    errors: list[FieldError] = []
