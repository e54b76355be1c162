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

MAX_WIDTH = 128
"""Most tokens whose log-probabilities can be asked for at one position."""
EMPTY_LOGPROB = -99999.0
"""Of an empty cell of `TopLogprobs`, whose id is 0; also the least that a cell holds."""

Width = Annotated[int, msgspec.Meta(ge=0, le=MAX_WIDTH)]


class SamplingParams(Strict):
    """How to draw tokens."""

    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)] | None = None
    """New tokens at most. None: up to the model's context. 0: only score the prompt."""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = -1
    """-1: all tokens."""
    stop: str | list[str | int] | None = None
    """A string, or strings and token ids, that end a sample; exactly these, so the model's end-of-sequence tokens only
    if they are named. None: the model's end-of-sequence tokens. []: nothing does."""
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
    """Whose turn it is where requests wait: owners are served in turn, however many requests each has."""
    topk_prompt_logprobs: Width = 0
    """K: also return the K likeliest tokens at each prompt position, at temperature 1."""
    topk_sample_logprobs: Width = 0
    """K: also return the K likeliest tokens at each sampled position, of the temperature-scaled distribution."""
    target_logprobs: Int32s | None = None
    """Token ids whose log-probabilities at temperature 1 are wanted: `target_width` of them for each prompt position
    after the first, one position behind the other, (N - 1) * `target_width` in all. -1: none wanted here."""
    target_width: Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)] = 1
    prompt_logprobs_last_n: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Compute `prompt_logprobs` and `topk_prompt_logprobs` for the last n prompt positions only. The results have the
    same shape; the other positions are missing in them."""
    session: str = ""
    """Of the client that asks; what it uses is counted there. Empty: a job's."""
    note: str = ""
    """The asker's own, given back in the answer."""


class TopLogprobs(Contract):
    """The likeliest tokens at each of some positions.

    `ids` and `logprobs` have `width` entries for each position, likeliest first, one position behind the other. A cell
    for which there is no token is empty: id 0, log-probability `EMPTY_LOGPROB`.
    """

    width: int
    ids: Int32s
    logprobs: Float32s


class SampledSequence(Contract):
    """One continuation. A stop token is included, once, and nothing after it."""

    tokens: Int32s
    logprobs: Float32s
    """Of each token under the temperature-scaled distribution (at temperature 0: of the unscaled one)."""
    stop_reason: StopReason
    top: TopLogprobs | None = None
    """With `topk_sample_logprobs`: one position for each token."""


class SampleResult(Contract, tag_field="kind", tag="sample"):
    """The answer to a `SampleRequest`: all sequences, by exactly the policy that was named."""

    request_id: str
    sequences: list[SampledSequence] = []
    prompt_logprobs: Float32s | None = None
    """N entries for a prompt of N tokens, the first NaN, and so all before the last `prompt_logprobs_last_n`."""
    policy: PolicyRef | None = None
    queue_seconds: float = 0.0
    """From arrival at the sampler to the first computation."""
    seconds: float = 0.0
    """From the first computation to the last token."""
    top_prompt_logprobs: TopLogprobs | None = None
    """With `topk_prompt_logprobs`: N positions, empty where `prompt_logprobs` would be NaN."""
    target_logprobs: Float32s | None = None
    """One for each entry of the request's `target_logprobs`; NaN for -1."""
    note: str = ""
    """Of the request."""
