"""Scores of a prompt: the log-probabilities of its own tokens, of tokens asked for, and of the likeliest ones.

All are at temperature 1, from the hidden states of the one pass that computes the prompt. Logits are made for a chunk
of positions at a time, and only where something is wanted: those of a whole long prompt would not fit into memory.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.sampler.engines.drawing import likeliest, total_logprob
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.sampling import EMPTY_LOGPROB, SampleRequest, TopLogprobs

LOGITS_AT_ONCE = 1 << 24
"""Entries of the logits of a prompt that are in memory at the same time (64 MiB in float32)."""

Logits = Callable[[Tensor], Tensor]
"""Maps hidden states [n, hidden] to logits [n, V], float32."""


@dataclass
class PromptScores:
    """What was asked for; see `SampleResult`."""

    logprobs: Float32s | None = None
    top: TopLogprobs | None = None
    targets: Float32s | None = None


def wants_scores(request: SampleRequest) -> bool:
    """Whether anything about the prompt is asked for."""
    return request.prompt_logprobs or request.topk_prompt_logprobs > 0 or request.target_logprobs is not None


def score_prompt(request: SampleRequest, hidden: Tensor, logits: Logits, vocabulary: int) -> PromptScores:
    """Compute what a request asks for from the hidden states [N, hidden] of its prompt.

    Raise `ArithmeticError` if logits are not finite.
    """
    scoring = _Scoring(request, vocabulary)
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    for start in range(scoring.first, len(request.prompt), size):
        stop = min(start + size, len(request.prompt))
        scoring.add(start, logits(hidden[start - 1 : stop - 1]))
    return scoring.scores


@dataclass
class _Scoring:
    """Scores while they are filled in, position by position; a token's logits come from the position before it."""

    request: SampleRequest
    vocabulary: int
    scores: PromptScores = field(default_factory=PromptScores)

    def __post_init__(self) -> None:
        request, length = self.request, len(self.request.prompt)
        if request.prompt_logprobs:
            self.scores.logprobs = Float32s([math.nan] * length)
        if width := request.topk_prompt_logprobs:
            cells = length * width
            self.scores.top = TopLogprobs(
                width=width, ids=Int32s([0] * cells), logprobs=Float32s([EMPTY_LOGPROB] * cells)
            )
        if request.target_logprobs is not None:
            self.scores.targets = Float32s([math.nan] * len(request.target_logprobs))

    @property
    def first(self) -> int:
        """The first position of which anything is wanted."""
        return min(self._first_scored, self._first_target)

    @property
    def _first_scored(self) -> int:
        length, last = len(self.request.prompt), self.request.prompt_logprobs_last_n
        if not self.request.prompt_logprobs and not self.request.topk_prompt_logprobs:
            return length
        return max(1, 0 if last is None else length - last)

    @property
    def _first_target(self) -> int:
        targets, width = self.request.target_logprobs or (), self.request.target_width
        wanted = next((index for index, target in enumerate(targets) if target >= 0), None)
        return len(self.request.prompt) if wanted is None else 1 + wanted // width

    def add(self, start: int, logits: Tensor) -> None:
        """Fill in what logits [n, V] say about the n positions from `start` on."""
        total = total_logprob(logits)
        if not bool(total.isfinite().all()):
            raise ArithmeticError("logits that are not finite")
        self._add_targets(start, logits, total)
        if (skipped := max(0, self._first_scored - start)) < len(logits):
            self._add_own(start + skipped, logits[skipped:], total[skipped:])
            self._add_top(start + skipped, logits[skipped:])

    def _add_own(self, start: int, logits: Tensor, total: Tensor) -> None:
        if self.scores.logprobs is not None:
            own = torch.tensor(self.request.prompt[start : start + len(logits)], device=logits.device).long()
            _put(self.scores.logprobs, start, logits.gather(1, own[:, None])[:, 0] - total)

    def _add_top(self, start: int, logits: Tensor) -> None:
        if (top := self.scores.top) is not None:
            count = min(top.width, self.vocabulary)
            ids, logprobs = likeliest(logits, count)
            for row, (some_ids, some_logprobs) in enumerate(zip(ids.tolist(), logprobs.tolist(), strict=True)):
                place = (start + row) * top.width
                top.ids[place : place + count] = array("i", some_ids)
                top.logprobs[place : place + count] = array("f", some_logprobs)

    def _add_targets(self, start: int, logits: Tensor, total: Tensor) -> None:
        given, width = self.request.target_logprobs, self.request.target_width
        if given is None or self.scores.targets is None:
            return
        place = (start - 1) * width
        some = torch.tensor(given[place : place + len(logits) * width], device=logits.device).long().view(-1, width)
        found = logits.gather(1, some.clamp(min=0)) - total[:, None]
        _put(self.scores.targets, place, found.masked_fill_(some < 0, math.nan).flatten())


def _put(into: Float32s, place: int, values: Tensor) -> None:
    into[place : place + len(values)] = array("f", values.tolist())
