"""Requests to a pool of samplers and their answers."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.base import Contract, Strict
from shared.contracts.policies import PolicyRef

StopReason = Literal["stop", "length"]
MOST_TOKENS = 1_000_000
"""In one sample; the model's context allows less."""


class SamplingParams(Strict):
    """How to draw tokens."""

    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)] | None = None
    """New tokens at most. None: up to the model's context. 0: only score the prompt."""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = -1
    """-1: all tokens."""
    stop: list[str | int] | None = None
    """Strings, or token ids, that end a sample. None: the model's end-of-sequence tokens. []: nothing does."""
    seed: int | None = None
    """Sample i of a request draws from a stream of its own of this seed. None: a new seed for every request."""


class SampleRequest(Contract):
    """Generate `num_samples` continuations of one prompt, prefilled once."""

    request_id: str
    base_model: str
    prompt: Int32s
    params: SamplingParams = SamplingParams()
    num_samples: Annotated[int, msgspec.Meta(ge=1)] = 1
    policy: PolicyRef | None = None
    """None: the base model without an adapter."""
    prompt_logprobs: bool = False
    """Also return the log-probability of each prompt token at temperature 1."""
    isolated: bool = False
    """Compute in a batch of its own. Slower; the result then does not depend, in the last bit, on other requests."""
    owner: str = "default"


class SampledSequence(Contract):
    """One continuation. A stop token is included, once, and nothing after it."""

    tokens: Int32s
    logprobs: Float32s
    """Of each token under the temperature-scaled distribution (at temperature 0: of the unscaled one)."""
    stop_reason: StopReason


class SampleResult(Contract, tag_field="kind", tag="sample"):
    """The answer to a `SampleRequest`: all sequences, by exactly the policy that was named."""

    request_id: str
    sequences: list[SampledSequence] = []
    prompt_logprobs: Float32s | None = None
    """N entries for a prompt of N tokens, the first NaN."""
    policy: PolicyRef | None = None
    queue_seconds: float = 0.0
    """From arrival at the sampler to the first computation."""
    seconds: float = 0.0
    """From the first computation to the last token."""
