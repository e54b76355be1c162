"""Log-probabilities: of samples, of prompts, of the likeliest tokens and of tokens asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.sampling import EMPTY_LOGPROB, TopLogprobs
from tests.engines.sampler_tools import PROMPTS, Prefill, StartAny, ask, logprobs_of, together


@torch.no_grad()
def distributions(model: Any, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities [N, V] of what follows each of N tokens."""
    found: Tensor = (model(torch.tensor([list(ids)])).logits[0].float() / temperature).log_softmax(-1)
    return found


def check_top(top: TopLogprobs | None, expected: Tensor, tolerance: float, *, empty: int = 0) -> None:
    """Compare with log-probabilities [positions, V], behind so many empty positions.

    Tokens that are nearly equally likely may change places.
    """
    assert top is not None
    ids = torch.tensor(top.ids).long().view(-1, top.width)
    logprobs = torch.tensor(top.logprobs).view(-1, top.width)
    assert (ids[:empty] == 0).all()
    assert (logprobs[:empty] == EMPTY_LOGPROB).all()
    ids, logprobs = ids[empty:], logprobs[empty:]
    assert [len(set(row)) for row in ids.tolist()] == [top.width] * len(expected)
    torch.testing.assert_close(logprobs, expected.gather(1, ids), atol=tolerance, rtol=0)
    torch.testing.assert_close(logprobs, expected.topk(top.width).values, atol=tolerance, rtol=0)


class Scores:
    """Everything is compared with one plain forward pass of transformers over the whole sequence."""

    @pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
    async def test_logprobs_equal_a_plain_forward_pass(
        self, start: StartAny, reference: Any, temperature: float, tolerance: float
    ) -> None:
        engine = await start()
        asked = [ask(prompt, temperature=temperature, num_samples=3, top_k=40, max_tokens=12) for prompt in PROMPTS]
        for request, result in zip(asked, await together(engine, asked), strict=True):
            assert len(result.sequences) == 3
            for sequence in result.sequences:
                expected = logprobs_of(reference, request.prompt, sequence.tokens.tolist(), temperature or 1.0)
                torch.testing.assert_close(torch.tensor(sequence.logprobs), expected, atol=tolerance, rtol=0)

    async def test_prompt_logprobs_equal_a_plain_forward_pass(
        self, start: StartAny, reference: Any, tolerance: float
    ) -> None:
        engine = await start()
        asked = [ask(p, prompt_logprobs=True, max_tokens=4, temperature=0.3) for p in PROMPTS]
        for request, result in zip(asked, await together(engine, asked), strict=True):
            found = torch.tensor(result.prompt_logprobs)
            assert len(found) == len(request.prompt)
            assert math.isnan(found[0])
            expected = logprobs_of(reference, request.prompt[:1], request.prompt[1:].tolist())
            torch.testing.assert_close(found[1:], expected, atol=tolerance, rtol=0)

    async def test_zero_tokens_only_score_the_prompt(self, start: StartAny) -> None:
        engine = await start()
        scored, sampled = await together(
            engine, [ask(PROMPTS[2], max_tokens=n, prompt_logprobs=True, num_samples=2) for n in (0, 5)]
        )
        assert [len(s.tokens) for s in scored.sequences] == [0, 0]
        assert [s.stop_reason for s in scored.sequences] == ["length", "length"]
        assert [len(s.tokens) for s in sampled.sequences] == [5, 5]
        assert scored.prompt_logprobs is not None
        assert sampled.prompt_logprobs is not None
        assert scored.prompt_logprobs[1:] == pytest.approx(list(sampled.prompt_logprobs[1:]), abs=1e-5)

    async def test_a_prompt_is_computed_once_for_all_of_its_samples(self, start: StartAny, prefill: Prefill) -> None:
        engine, prompt = await start(), [at * 7 % 250 for at in range(100)]
        await engine.generate(ask(prompt, num_samples=7))
        assert engine.load().prompt_tokens == len(prompt) + 6 * prefill.again(len(prompt))

    @pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
    async def test_likeliest_tokens_of_samples_are_of_the_scaled_distribution(
        self, start: StartAny, reference: Any, temperature: float, tolerance: float
    ) -> None:
        engine = await start()
        asked = [
            ask(
                prompt,
                temperature=temperature,
                top_k=9,
                num_samples=2,
                topk_sample_logprobs=width,
                max_tokens=7 + width,
            )
            for prompt, width in zip(PROMPTS, (1, 0, 5, 3, 2), strict=True)
        ]
        for request, result in zip(asked, await together(engine, asked), strict=True):
            for sequence in result.sequences:
                if not request.topk_sample_logprobs:
                    assert sequence.top is None
                    continue
                whole = distributions(reference, [*request.prompt, *sequence.tokens], temperature or 1.0)
                check_top(sequence.top, whole[len(request.prompt) - 1 : -1], tolerance)

    async def test_likeliest_tokens_of_a_prompt(self, start: StartAny, reference: Any, tolerance: float) -> None:
        engine = await start()
        asked = [ask(prompt, topk_prompt_logprobs=4, temperature=0.3, max_tokens=2) for prompt in PROMPTS]
        for request, result in zip(asked, await together(engine, asked), strict=True):
            expected = distributions(reference, request.prompt)[:-1]
            check_top(result.top_prompt_logprobs, expected, tolerance, empty=1)
            assert result.prompt_logprobs is None

    async def test_targets_are_scored_where_they_are_named(
        self, start: StartAny, reference: Any, tolerance: float
    ) -> None:
        engine = await start()
        prompt = PROMPTS[3]
        targets = [-1, -1, 7, -1, 263, 0, -1, -1, 5, 5, -1, 12, 9, 8]
        result = await engine.generate(ask(prompt, target_logprobs=Int32s(targets), target_width=2, max_tokens=0))
        assert result.target_logprobs is not None
        expected = distributions(reference, prompt)
        for place, (target, found) in enumerate(zip(targets, result.target_logprobs, strict=True)):
            if target < 0:
                assert math.isnan(found)
            else:
                assert found == pytest.approx(float(expected[place // 2, target]), abs=tolerance)

    @pytest.mark.parametrize("last", [0, 1, 3, 34, 35, 1000])
    async def test_only_the_last_positions_are_scored_if_that_is_asked(
        self, start: StartAny, reference: Any, last: int, tolerance: float
    ) -> None:
        engine = await start()
        prompt = PROMPTS[2]
        result = await engine.generate(
            ask(prompt, prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=last, max_tokens=0)
        )
        first = max(1, len(prompt) - last)
        assert result.prompt_logprobs is not None
        assert [math.isnan(value) for value in result.prompt_logprobs] == [at < first for at in range(len(prompt))]
        expected = logprobs_of(reference, prompt[:first], prompt[first:]).tolist() if first < len(prompt) else []
        assert result.prompt_logprobs[first:].tolist() == pytest.approx(expected, abs=tolerance)
        check_top(result.top_prompt_logprobs, distributions(reference, prompt)[first - 1 : -1], tolerance, empty=first)

    async def test_everything_at_once_takes_one_prefill(self, start: StartAny, prefill: Prefill) -> None:
        engine = await start()
        targets = Int32s([3] * (len(PROMPTS[2]) - 1))
        request = ask(
            PROMPTS[2], num_samples=3, prompt_logprobs=True, topk_prompt_logprobs=128, topk_sample_logprobs=2,
            target_logprobs=targets, prompt_logprobs_last_n=4,
        )  # fmt: skip
        result = await engine.generate(request)
        assert engine.load().prompt_tokens == len(PROMPTS[2]) + 2 * prefill.again(len(PROMPTS[2]))
        assert result.target_logprobs is not None
        assert not any(map(math.isnan, result.target_logprobs)), "these are named one by one, whatever last_n says"
        assert result.top_prompt_logprobs is not None
        assert len(set(result.top_prompt_logprobs.ids[-128:])) == 128

    async def test_a_prompt_of_one_token_has_nothing_to_score(self, start: StartAny) -> None:
        engine = await start()
        wanted: dict[str, Any] = {"prompt_logprobs": True, "topk_prompt_logprobs": 1, "target_logprobs": Int32s()}
        result = await engine.generate(ask([5], **wanted, topk_sample_logprobs=1, max_tokens=0))
        assert result.prompt_logprobs is not None
        assert [math.isnan(value) for value in result.prompt_logprobs] == [True]
        empty = TopLogprobs(width=1, ids=Int32s([0]), logprobs=Float32s([EMPTY_LOGPROB]))
        assert result.top_prompt_logprobs == empty
        assert result.target_logprobs == Float32s()
        assert result.sequences[0].top == TopLogprobs(width=1, ids=Int32s(), logprobs=Float32s())
