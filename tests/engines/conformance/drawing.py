"""Which tokens are drawn: the right distribution, and the same ones again for the same seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from services.sampler.engines.base import SamplerEngine
from shared.contracts.sampling import SampledSequence
from tests.engines.sampler_tools import PROMPTS, Prefill, StartAny, ask, continued, together, tokens
from tests.engines.tiny import VOCABULARY

FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.5},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.9},
]
FALSE_ALARM = 1e-6
"""How often, over all seeds, an engine that draws right would fail one of the comparisons. The seeds are fixed."""


def expected_distribution(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities after temperature, then top-k, then top-p of what top-k has left. Written to be read."""
    probabilities, order = torch.softmax(logits.double() / temperature, -1).sort(descending=True)
    if top_k:
        probabilities[top_k:] = 0
    probabilities /= probabilities.sum()
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= top_p] = 0
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())


def chance(counts: Tensor, probabilities: Tensor) -> float:
    """How probable counts at least so far from expectation are (Pearson's chi-square test).

    Tokens expected less than five times are pooled; one drawn against probability 0 makes the counts impossible.
    """
    if bool(counts[probabilities == 0].any()):
        return 0.0
    expected = probabilities * counts.sum()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    found = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    some = expected > 0
    statistic = ((found - expected)[some] ** 2 / expected[some]).sum()
    return float(torch.special.gammaincc((some.sum() - 1) / 2, statistic / 2))


@torch.no_grad()
def next_logits(reference: Any) -> Tensor:
    """Logits of the token behind the prompt that `counts_of` samples from."""
    logits: Tensor = reference(torch.tensor([PROMPTS[1]])).logits[0, -1]
    return logits


async def counts_of(engine: SamplerEngine, settings: dict[str, Any]) -> Tensor:
    """How often each token comes first in 8,192 samples."""
    asked = [ask(PROMPTS[1], num_samples=512, max_tokens=1, seed=seed, **settings) for seed in range(16)]
    drawn = [sequence.tokens[0] for result in await together(engine, asked) for sequence in result.sequences]
    return torch.bincount(torch.tensor(drawn), minlength=VOCABULARY)


class Drawing:
    """Distributions, seeds, and what is computed beside."""

    async def test_samples_follow_the_exact_distribution(self, start: StartAny, reference: Any) -> None:
        """And would not pass for samples of any other of the distributions, so the test can fail."""
        engine = await start(max_sequences=512)
        counts = [await counts_of(engine, settings) for settings in FILTERS]
        logits = next_logits(reference)
        for drawn, found in enumerate(counts):
            for compared, settings in enumerate(FILTERS):
                passes = chance(found, expected_distribution(logits, **settings)) > FALSE_ALARM
                assert passes == (drawn == compared), (FILTERS[drawn], settings)

    async def test_small_deviations_would_be_noticed(self, start: StartAny, reference: Any) -> None:
        engine = await start(max_sequences=512)
        logits = next_logits(reference)
        found = await counts_of(engine, {"temperature": 1.5, "top_k": 20})
        for wrong in (19, 22):
            assert chance(found, expected_distribution(logits, temperature=1.5, top_k=wrong)) < FALSE_ALARM
        found = await counts_of(engine, {"temperature": 0.7})
        for temperature in (0.6, 0.8):
            assert chance(found, expected_distribution(logits, temperature=temperature)) < FALSE_ALARM

    async def test_temperature_zero_takes_the_likeliest_token(self, start: StartAny, reference: Any) -> None:
        engine = await start()
        results = await together(engine, [ask(prompt, temperature=0, max_tokens=20) for prompt in PROMPTS])
        for prompt, result in zip(PROMPTS, results, strict=True):
            assert tokens(result) == continued(reference, prompt, 20)

    async def test_the_samples_of_a_seeded_request_differ_and_come_again(self, start: StartAny) -> None:
        engine = await start()
        request = ask(PROMPTS[3], seed=3, num_samples=8, max_tokens=16)
        first, again = await engine.generate(request), await engine.generate(request)
        assert len({tuple(s.tokens) for s in first.sequences}) == 8
        assert [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences]

    async def test_samples_of_a_request_and_requests_without_a_seed_differ(self, start: StartAny) -> None:
        engine = await start()
        seeded, first, second = await together(
            engine, [ask(PROMPTS[3], num_samples=8, max_tokens=16, seed=seed) for seed in (1, None, None)]
        )
        everything = [tuple(s.tokens) for result in (seeded, first, second) for s in result.sequences]
        assert len(set(everything)) == 24

    async def test_the_first_samples_do_not_depend_on_how_many_are_asked(self, start: StartAny) -> None:
        engine = await start()
        few, many = await together(engine, [ask(PROMPTS[3], num_samples=n, seed=5) for n in (2, 6)])
        assert [s.tokens for s in few.sequences] == [s.tokens for s in many.sequences[:2]]

    async def test_a_seed_gives_the_same_samples_whatever_else_is_computed(self, start: StartAny) -> None:
        engine = await start()
        request = ask(PROMPTS[3], seed=11, num_samples=4, max_tokens=16)
        alone = await engine.generate(request)
        others = [ask(prompt, num_samples=3, max_tokens=30) for prompt in PROMPTS]
        *_, among = await together(engine, [*others, request])
        assert [s.tokens for s in alone.sequences] == [s.tokens for s in among.sequences]

    async def test_rows_that_end_at_different_times_leave_the_others_right(
        self, start: StartAny, reference: Any, prefill: Prefill
    ) -> None:
        engine = await start(max_sequences=6)
        lengths = [1, 30, 2, 17, 9, 25, 3, 40, 5, 12, 21, 70]
        asked = [(PROMPTS[index % len(PROMPTS)], count) for index, count in enumerate(lengths)]
        results = await together(engine, [ask(prompt, temperature=0, max_tokens=count) for prompt, count in asked])
        for (prompt, count), result in zip(asked, results, strict=True):
            assert tokens(result) == continued(reference, prompt, count)
        assert engine.load().running == engine.load().waiting == 0
        assert engine.load().sampled_tokens == sum(lengths)
        total = sum(len(prompt) for prompt, _ in asked)
        assert total - prefill.reused(len(prompt) for prompt, _ in asked) <= engine.load().prompt_tokens <= total

    async def test_isolated_results_are_bitwise_independent_of_traffic(self, start: StartAny) -> None:
        requests = [
            ask(prompt, seed=seed, num_samples=3, max_tokens=20, isolated=True, prompt_logprobs=True)
            for seed, prompt in enumerate(PROMPTS)
        ]
        engine = await start()
        before = [await engine.generate(request) for request in requests]
        traffic = [ask(prompt, num_samples=5, max_tokens=9 + at) for at, prompt in enumerate(PROMPTS * 2)]
        mixed = [request for pair in zip(traffic, requests[::-1] * 2, strict=True) for request in pair]
        during = (await together(engine, mixed))[1::2]
        for expected, found in zip((before[::-1]) * 2, during, strict=True):
            assert [_bytes(s) for s in expected.sequences] == [_bytes(s) for s in found.sequences]
            assert expected.prompt_logprobs is not None
            assert found.prompt_logprobs is not None
            assert expected.prompt_logprobs.tobytes() == found.prompt_logprobs.tobytes()


def _bytes(sequence: SampledSequence) -> tuple[bytes, bytes]:
    return sequence.tokens.tobytes(), sequence.logprobs.tobytes()
