"""What an engine can answer, and the errors that say so."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import psutil
import torch

from services.sampler.engines.batching import padded
from services.sampler.engines.stops import stop_list
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampleRequest
from shared.errors import UserError

MAX_STOPS, MAX_STOP_LENGTH = 256, 1024
"""Every sample is compared with every stop string at every token."""
MAX_CELLS = 1 << 22
"""Log-probabilities of likeliest tokens, or of targets, in one answer: 32 MiB with their ids."""
_CPU_SHARE, _GPU_SHARE = 0.5, 0.7


@dataclass(frozen=True)
class Limits:
    """The bounds of one engine."""

    base_model: str
    vocabulary: int
    """Ids are below this."""
    context: int
    """Tokens of prompt and sample together."""
    sequences: int
    """Of one request, and at the same time."""
    positions: int
    """Sequences times their length that fit into the cache."""
    decodes: bool
    """Whether ids can be turned into text, which stop strings need."""

    def new_tokens(self, request: SampleRequest) -> int:
        """Return how many tokens each sequence of a request may get."""
        wanted = request.params.max_tokens
        return self.context - len(request.prompt) if wanted is None else wanted

    def check(self, request: SampleRequest, policies: Collection[PolicyRef]) -> None:
        """Raise `UserError`, naming value, rule and way out, for a request that can never be answered."""
        if request.base_model != self.base_model:
            raise UserError(f"base model {request.base_model!r} is not served here: this is {self.base_model!r}")
        if request.policy is not None and request.policy not in policies:
            raise UserError(f"policy {request.policy} is not loaded: load it before it is sampled")
        self._check_prompt(request)
        self._check_size(request)
        self._check_params(request)
        self._check_scores(request)

    def _check_prompt(self, request: SampleRequest) -> None:
        if not request.prompt:
            raise UserError("the prompt is empty: it needs at least one token")
        self._check_ids(request.prompt, "the prompt", least=0)

    def _check_ids(self, ids: Sequence[int], where: str, *, least: int) -> None:
        last = self.vocabulary - 1
        for worst in (min(ids, default=least), max(ids, default=least)):
            if not least <= worst <= last:
                raise UserError(f"token id {worst} in {where} is outside of the vocabulary: ids go from 0 to {last}")

    def _check_size(self, request: SampleRequest) -> None:
        prompt, wanted = len(request.prompt), request.params.max_tokens
        if wanted is None and prompt >= self.context:
            raise UserError(f"a prompt of {prompt} tokens leaves no room in the context of {self.context}: shorten it")
        if wanted is not None and prompt + wanted > self.context:
            raise UserError(
                f"a prompt of {prompt} tokens and max_tokens {wanted} are more than the context of {self.context}: "
                "shorten the prompt or ask for fewer tokens"
            )
        if request.num_samples > self.sequences:
            raise UserError(
                f"num_samples {request.num_samples} is more than the {self.sequences} sequences that are generated at "
                "the same time: ask with several requests"
            )
        length = padded(prompt + self.new_tokens(request))
        if self.new_tokens(request) and request.num_samples * length > self.positions:
            raise UserError(
                f"{request.num_samples} samples of up to {length} tokens are more than the {self.positions} that fit "
                "into memory: lower num_samples or max_tokens"
            )

    def _check_params(self, request: SampleRequest) -> None:
        params = request.params
        if params.top_k == 0:
            raise UserError("top_k 0 leaves no token to choose: use -1 for all tokens")
        if not (math.isfinite(params.temperature) and math.isfinite(params.top_p)):
            raise UserError(f"temperature {params.temperature} and top_p {params.top_p}: both must be finite numbers")
        self._check_stop(stop_list(params.stop))

    def _check_stop(self, stop: Sequence[str | int]) -> None:
        if len(stop) > MAX_STOPS:
            raise UserError(f"{len(stop)} stops are more than the {MAX_STOPS} that are looked for: leave some out")
        self._check_ids([item for item in stop if isinstance(item, int)], "stop", least=0)
        strings = [item for item in stop if isinstance(item, str)]
        if any(len(string) > MAX_STOP_LENGTH for string in strings):
            raise UserError(f"a stop string has more than {MAX_STOP_LENGTH} characters: shorten it")
        if "" in strings:
            raise UserError("a stop string is empty: it would end every sample at once; leave it out")
        if strings and not self.decodes:
            raise UserError(f"stop strings such as {strings[0]!r} need a tokenizer, which is not here: use token ids")

    def _check_scores(self, request: SampleRequest) -> None:
        prompt, targets = len(request.prompt), request.target_logprobs
        if targets is not None and len(targets) != (prompt - 1) * request.target_width:
            raise UserError(
                f"target_logprobs has {len(targets)} ids: a prompt of {prompt} tokens needs {request.target_width} "
                f"(target_width) for each token after the first, {(prompt - 1) * request.target_width} in all"
            )
        self._check_ids(targets or (), "target_logprobs", least=-1)
        sampled = request.num_samples * self.new_tokens(request)
        cells = prompt * request.topk_prompt_logprobs + sampled * request.topk_sample_logprobs + len(targets or ())
        if cells > MAX_CELLS:
            raise UserError(
                f"{cells} log-probabilities of likeliest tokens and targets are more than the {MAX_CELLS} of one "
                "answer: lower topk_prompt_logprobs, topk_sample_logprobs, max_tokens or num_samples"
            )


def cache_bytes(device: torch.device) -> int:
    """Return how much memory the cache may take: half of a host's available, 70 % of a GPU's free memory.

    The rest is for activations, logits and adapters. It is a bound: memory is taken as sequences need it.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return int(psutil.virtual_memory().available * _CPU_SHARE)
