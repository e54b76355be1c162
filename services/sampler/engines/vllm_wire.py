"""How a request travels to vLLM's processes and its numbers come back, through vLLM's own types and unchanged.

vLLM gives log-probabilities after top-k and top-p, or before the temperature, and draws seeded requests one by one with
generators of the device's; neither is what a request means (docs/sampling.md). So each sequence is a greedy request of
vLLM's that carries in `extra_args` what our logits processor needs to draw a token itself, exactly as the torch engine
does. The processor hands back logits in which the drawn token has *minus* its log-probability, which makes it the only
one that is not negative, hence vLLM's choice; the likeliest tokens have their log-probabilities, and all others minus
infinity. `logprobs_mode="processed_logits"` returns these numbers as they are.

Scores of a prompt come as vLLM's prompt log-probabilities, with columns of our own: the prompt's token, the targets,
the likeliest tokens. `vllm_worker` fills them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.sampling import EMPTY_LOGPROB, SampleRequest, SamplingParams, TopLogprobs

DRAWING, SCORING = "openrl_drawing", "openrl_scoring"
"""Keys of `extra_args`."""


def drawing_arguments(params: SamplingParams, key: int, width: int) -> dict[str, Any]:
    """For a sequence whose random stream starts with `key`, with the `width` likeliest tokens at each position."""
    return {
        "key": key,
        "width": width,
        "temperature": params.temperature,
        "top_k": min(params.top_k, 1 << 31),  # more than any vocabulary, less than what a message carries
        "top_p": params.top_p,
    }


@dataclass(frozen=True)
class Columns:
    """What is computed at each position of a prompt, and from which position on."""

    targets: int
    top: int
    first_scored: int
    """The first position whose own token and likeliest tokens are wanted; the prompt's length: none."""
    first_target: int

    @classmethod
    def of(cls, request: SampleRequest, vocabulary: int) -> Columns:
        """Of a request that wants scores."""
        length, last = len(request.prompt), request.prompt_logprobs_last_n
        own = request.prompt_logprobs or request.topk_prompt_logprobs > 0
        targets, width = request.target_logprobs or (), request.target_width
        named = next((index for index, target in enumerate(targets) if target >= 0), None)
        return cls(
            targets=width if request.target_logprobs else 0,
            top=min(request.topk_prompt_logprobs, vocabulary),
            first_scored=max(1, 0 if last is None else length - last) if own else length,
            first_target=length if named is None else 1 + named // width,
        )

    @property
    def count(self) -> int:
        """Columns beside the one of the prompt's own token."""
        return self.targets + self.top

    @property
    def first(self) -> int:
        """The first position of which anything is wanted."""
        return min(self.first_scored, self.first_target)

    def arguments(self, request: SampleRequest) -> dict[str, Any]:
        """For the worker."""
        targets = list(request.target_logprobs or ())
        return {"targets": self.targets, "top": self.top, "first": self.first, "target_ids": targets}


@dataclass(frozen=True)
class Rows:
    """Equally long rows of ids and numbers, one behind the other."""

    ids: Sequence[int]
    values: Sequence[float]
    width: int

    def __iter__(self) -> Iterator[tuple[list[int], list[float]]]:
        for place in range(0, len(self.ids), self.width):
            yield list(self.ids[place : place + self.width]), list(self.values[place : place + self.width])


def flat_rows(flat: Any, count: int) -> Rows:
    """The last `count` positions of vLLM's `FlatLogprobs`."""
    first = flat.start_indices[-count] if count else len(flat.token_ids)
    width = flat.end_indices[-1] - flat.start_indices[-1] if count else 1
    return Rows(flat.token_ids[first:], flat.logprobs[first:], width)


def drawn(ids: Sequence[int], values: Sequence[float], width: int) -> tuple[float, list[int], list[float]]:
    """Read what the logits processor says of one token, which is the first: its log-probability, and the likeliest.

    NaN if the logits were not finite.
    """
    if not math.isfinite(values[0]):
        return math.nan, [], []
    logprob = -values[0]
    others = {token: value for token, value in zip(ids[1:], values[1:], strict=True) if value != -math.inf}
    best = sorted((others | {ids[0]: max(logprob, EMPTY_LOGPROB)}).items(), key=lambda item: -item[1])[:width]
    return logprob, [token for token, _ in best], [value for _, value in best]


@dataclass
class PromptScores:
    """See `SampleResult`."""

    logprobs: Float32s | None = None
    top: TopLogprobs | None = None
    targets: Float32s | None = None


def prompt_scores(request: SampleRequest, columns: Columns, rows: Rows) -> PromptScores:
    """Sort the columns of the positions after the first into what was asked for.

    Raise `ArithmeticError` if logits were not finite.
    """
    length, width = len(request.prompt), request.topk_prompt_logprobs
    own, targets = Float32s([math.nan] * length), Float32s([math.nan] * len(request.target_logprobs or ()))
    ids, logprobs = Int32s([0] * (length * width)), Float32s([EMPTY_LOGPROB] * (length * width))
    for position, (row_ids, values) in enumerate(rows, 1):
        if position < columns.first:
            continue
        if not all(map(math.isfinite, values)):
            raise ArithmeticError("logits that are not finite")
        _put_targets(request, targets, position, values)
        if position >= columns.first_scored:
            own[position] = values[0]
            for place in range(columns.top):
                ids[position * width + place] = row_ids[1 + columns.targets + place]
                logprobs[position * width + place] = values[1 + columns.targets + place]
    return PromptScores(
        logprobs=own if request.prompt_logprobs else None,
        top=TopLogprobs(width=width, ids=ids, logprobs=logprobs) if width else None,
        targets=targets if request.target_logprobs is not None else None,
    )


def _put_targets(request: SampleRequest, into: Float32s, position: int, values: Sequence[float]) -> None:
    if not request.target_logprobs:
        return
    start = (position - 1) * request.target_width
    for place in range(request.target_width):
        if request.target_logprobs[start + place] >= 0:
            into[start + place] = values[1 + place]


def scoring_of(extra: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What the worker has to score; None: nothing of ours."""
    return (extra or {}).get(SCORING)
