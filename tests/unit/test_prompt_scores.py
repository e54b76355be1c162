"""Scores of a prompt are computed in chunks, only where something is wanted, whatever the width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from services.sampler.engines import scoring
from services.sampler.engines.scoring import PromptScores, score_prompt, wants_scores
from shared.contracts.arrays import Int32s
from shared.contracts.sampling import EMPTY_LOGPROB, SampleRequest

VOCABULARY = 5
HEAD = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
PROMPT = [position * 7 % VOCABULARY for position in range(len(HIDDEN))]


class Head:
    """Counts the rows of logits that it is asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return hidden @ HEAD


def score(head: Head | None = None, **wanted: Any) -> PromptScores:
    request = SampleRequest(request_id="r", base_model="tiny", prompt=Int32s(PROMPT), **wanted)
    assert wants_scores(request)
    return score_prompt(request, HIDDEN, head or Head(), VOCABULARY)


def test_no_more_logits_are_made_at_a_time_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = Int32s([3, -1] * 39)
    wanted: dict[str, Any] = {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "target_logprobs": targets}
    whole = score(**wanted, target_width=2)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    head = Head()
    parts = score(head, **wanted, target_width=2)
    assert head.rows == [7, 7, 7, 7, 7, 4]
    assert whole.logprobs is not None
    assert parts.logprobs is not None
    assert parts.logprobs[1:] == whole.logprobs[1:]
    assert parts.top == whole.top
    assert parts.targets is not None
    assert whole.targets is not None
    assert parts.targets.tobytes() == whole.targets.tobytes()


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 3}, [3]),
        ({"topk_prompt_logprobs": 1, "prompt_logprobs_last_n": 0}, []),
        ({"target_logprobs": Int32s([-1] * 39)}, []),
        ({"target_logprobs": Int32s([-1] * 30 + [2] * 9)}, [9]),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 5, "target_logprobs": Int32s([-1] * 38 + [0])}, [5]),
    ],
)
def test_only_what_is_wanted_is_computed(wanted: dict[str, Any], rows: Sequence[int]) -> None:
    head = Head()
    score(head, **wanted)
    assert head.rows == rows


def test_cells_beyond_the_vocabulary_are_empty() -> None:
    top = score(topk_prompt_logprobs=VOCABULARY + 2).top
    assert top is not None
    for place in range(0, len(top.ids), top.width):
        ids, logprobs = top.ids[place : place + top.width], top.logprobs[place : place + top.width]
        full = VOCABULARY if place else 0
        assert len(set(ids[:full])) == full
        assert sum(map(math.exp, logprobs[:full])) == pytest.approx(1 if full else 0)
        assert ids[full:].tolist() == [0] * (top.width - full)
        assert logprobs[full:].tolist() == [EMPTY_LOGPROB] * (top.width - full)


def test_logits_that_are_not_finite_are_an_error() -> None:
    request = SampleRequest(request_id="r", base_model="tiny", prompt=Int32s(PROMPT), prompt_logprobs=True)
    with pytest.raises(ArithmeticError, match="not finite"):
        score_prompt(request, HIDDEN, lambda hidden: hidden @ HEAD * math.nan, VOCABULARY)
