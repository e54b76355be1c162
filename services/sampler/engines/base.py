"""What the sampler asks of an engine.

An engine holds one base model and some policies (adapters), and generates for many requests at the same time. It
knows neither bus nor blob store: the service gives it a policy's files before the first request that names it. What
requests mean is said in docs/sampling.md; `tests.engines.conformance` tests it for every engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is, for metrics and for people."""

    running: int = 0
    """Sequences being generated."""
    waiting: int = 0
    """Sequences that wait for a place."""
    prompt_tokens: int = 0
    """Prompt tokens computed since the start."""
    sampled_tokens: int = 0
    """Tokens generated since the start."""
    kv_cache: float = 0.0
    """Share of the key-value cache that is in use or promised, 0 to 1."""


class SamplerEngine(Protocol):
    """One base model, many policies, many requests."""

    @property
    def base_model(self) -> str:
        """Name under which requests ask for this model."""

    @property
    def policies(self) -> frozenset[PolicyRef]:
        """Policies that are loaded."""

    @property
    def capacity(self) -> int:
        """How many policies can be loaded at the same time."""

    def problem(self) -> str | None:
        """Why the engine cannot answer any more; None: it can."""

    def load(self) -> EngineLoad:
        """How busy the engine is."""

    def check(self, request: SampleRequest) -> None:
        """Raise `UserError` for a request that can never be answered: too long, ids outside the vocabulary."""

    async def start(self) -> None:
        """Load the base model and begin. Raise `UserError` if the model cannot be used."""

    async def load_policy(self, policy: PolicyRef, files: Mapping[str, bytes]) -> None:
        """Make a policy ready from PEFT's files (name to content). Loading one twice is harmless.

        Raise `PermanentError` if the files do not fit the base model.
        """

    async def unload_policy(self, policy: PolicyRef) -> None:
        """Free a policy's memory. The service calls it only when no request names it."""

    async def generate(self, request: SampleRequest) -> SampleResult:
        """Answer a request. Its policy has been loaded. Cancelling the caller frees the request's place at once.

        Raise as `check` does.
        """

    async def stop(self) -> None:
        """End; requests still running are cancelled. Idempotent."""
