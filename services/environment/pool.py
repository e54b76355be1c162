"""Asking the samplers of a base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.episodes import PlayGroup
from shared.contracts.sampling import SampledSequence, SampleRequest, SampleResult, SamplingParams
from shared.errors import PermanentError


class Pool(Protocol):
    """What playing needs of the samplers."""

    async def sample(
        self, group: PlayGroup, prompt: Sequence[int], *, seed: int, count: int = 1
    ) -> list[SampledSequence]:
        """`count` continuations of one prompt by the group's policy."""

    async def reference_logprobs(self, group: PlayGroup, prompt: Sequence[int], tokens: Sequence[int]) -> Float32s:
        """Log-probability of each of `tokens` behind `prompt`, under the base model."""


class BusPool:
    """The samplers, over the bus."""

    def __init__(self, bus: Bus, timeout_s: float) -> None:
        self._bus = bus
        self._timeout = timeout_s

    async def sample(
        self, group: PlayGroup, prompt: Sequence[int], *, seed: int, count: int = 1
    ) -> list[SampledSequence]:
        """See `Pool.sample`. Raise `PermanentError` if they refuse, `TemporaryError` if nobody answers in time."""
        request = SampleRequest(
            request_id=self._bus.new_request(),
            base_model=group.base_model,
            prompt=Int32s(prompt),
            params=msgspec.structs.replace(group.sampling, seed=seed),
            num_samples=count,
            policy=group.policy,
            isolated=group.isolated,
            owner=group.owner,
        )
        sequences = (await self._ask(request)).sequences
        if len(sequences) != count:
            raise PermanentError(f"the samplers of {group.base_model} gave {len(sequences)} of {count} sequences")
        return sequences

    async def reference_logprobs(self, group: PlayGroup, prompt: Sequence[int], tokens: Sequence[int]) -> Float32s:
        """See `Pool.reference_logprobs`. Errors as those of `sample`."""
        request = SampleRequest(
            request_id=self._bus.new_request(),
            base_model=group.base_model,
            prompt=Int32s([*prompt, *tokens]),
            params=SamplingParams(max_tokens=0),
            prompt_logprobs=True,
            isolated=group.isolated,
            owner=group.owner,
        )
        logprobs = (await self._ask(request)).prompt_logprobs
        if logprobs is None or len(logprobs) != len(request.prompt):
            given = "no" if logprobs is None else len(logprobs)
            raise PermanentError(f"the samplers of {group.base_model} gave {given} of {len(request.prompt)} logprobs")
        return Float32s(logprobs[len(prompt) :])

    async def _ask(self, request: SampleRequest) -> SampleResult:
        result = await self._bus.ask(topology.SAMPLES, request, timeout=self._timeout, pool=request.base_model)
        if not isinstance(result, SampleResult):
            raise PermanentError(f"the samplers of {request.base_model} answered with {type(result).__name__}")
        return result
