"""Drawing tokens: exact distributions, exact supports, and streams that depend on seed, sample and position only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from services.sampler.engines.drawing import Drawing, draw, stream_key, total_logprob, uniforms
from shared.contracts.sampling import SamplingParams

CPU = torch.device("cpu")


def spread(vocabulary: int, *, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def numbers(count: int, *, seed: int = 0) -> Tensor:
    keys = torch.tensor([stream_key(seed, row) for row in range(count)])
    return uniforms(keys, torch.zeros_like(keys))


def drawn(logits: Tensor, count: int, **params: object) -> Tensor:
    drawing = Drawing.of([SamplingParams(**params)] * count, CPU)  # type: ignore[arg-type]
    return draw(logits.repeat(count, 1), drawing, numbers(count))[0]


def chi_square_excess(tokens: Tensor, probabilities: Tensor) -> float:
    """Return by how many standard deviations the statistic exceeds its mean; tokens expected < 5 times are pooled."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    some = expected > 0
    freedom = int(some.sum()) - 1
    statistic = float(((counts - expected)[some] ** 2 / expected[some]).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocabulary", [7, 256, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_any_temperature(vocabulary: int, temperature: float) -> None:
    logits = spread(vocabulary)
    tokens = drawn(logits, 5000, temperature=temperature)
    assert abs(chi_square_excess(tokens, torch.softmax(logits / temperature, -1))) < 4


def test_the_chi_square_test_notices_a_wrong_temperature() -> None:
    logits = spread(256)
    assert chi_square_excess(drawn(logits, 5000, temperature=1.2), torch.softmax(logits, -1)) > 8


def test_filtered_samples_follow_the_renormalised_softmax() -> None:
    logits = spread(300)
    probabilities = torch.softmax(logits, -1)
    best = probabilities.topk(20).indices
    expected = torch.zeros(300).scatter(0, best, probabilities[best] / probabilities[best].sum())
    assert abs(chi_square_excess(drawn(logits, 10_000, top_k=20), expected)) < 4


@pytest.mark.parametrize("count", [1, 5, 300])
def test_top_k_draws_all_of_the_k_likeliest_tokens_and_no_other(count: int) -> None:
    logits = spread(300, scale=0.2)
    tokens = drawn(logits, 10_000, top_k=count)
    assert set(tokens.tolist()) == set(logits.topk(count).indices.tolist())


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9])
def test_top_p_draws_the_smallest_set_of_that_mass_and_no_other(mass: float) -> None:
    logits = spread(60, scale=1.0)
    probabilities, order = torch.softmax(logits.double(), -1).sort(descending=True)
    size = int((probabilities.cumsum(0) < mass).sum()) + 1
    assert set(drawn(logits, 10_000, top_p=mass).tolist()) == set(order[:size].tolist())


def test_top_p_counts_the_mass_that_top_k_has_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # of the two likeliest, 4/7 and 3/7 are left: 0.55 is reached by the first one alone
    assert set(drawn(logits, 2000, top_k=2, top_p=0.55).tolist()) == {0}
    assert set(drawn(logits, 2000, top_k=2, top_p=0.58).tolist()) == {0, 1}


def test_top_p_looks_beyond_the_first_candidates_in_a_flat_distribution() -> None:
    tokens = drawn(torch.zeros(4096), 2000, top_p=0.9)
    # all equally likely: 2000 draws from 3687 tokens give about 1543 different ones
    assert 1400 < len(set(tokens.tolist())) < 1700


def test_a_token_without_probability_is_never_drawn_whatever_the_number() -> None:
    logits = torch.full((2, 600), -math.inf)
    logits[:, [0, 255, 300, 511]] = 0.0
    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = draw(logits, Drawing.of([SamplingParams()] * 2, CPU), extremes)
    assert tokens.tolist() == [0, 511]


def test_temperature_zero_takes_the_likeliest_token_with_its_unscaled_logprob() -> None:
    logits = spread(1000)
    tokens, logprobs = draw(logits[None].clone(), Drawing.of([SamplingParams(temperature=0)], CPU), numbers(1))
    assert tokens.item() == logits.argmax().item()
    assert logprobs.item() == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-5)


def test_logprobs_are_of_the_scaled_distribution_before_filters() -> None:
    logits = spread(1000)
    params = [SamplingParams(temperature=0.7, top_k=3, top_p=0.8), SamplingParams(temperature=0.7)]
    tokens, logprobs = draw(logits.repeat(2, 1), Drawing.of(params, CPU), numbers(2))
    expected = (logits / 0.7).log_softmax(-1)[tokens]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


def test_every_row_of_a_mixed_batch_is_drawn_as_if_it_were_alone() -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.5, top_k=4),
        SamplingParams(top_p=0.3),
        SamplingParams(temperature=1e-35),
        SamplingParams(top_k=1),
    ]
    logits = torch.stack([spread(700, seed=row) for row in range(len(params))])
    given = numbers(len(params))
    tokens, logprobs = draw(logits.clone(), Drawing.of(params, CPU), given)
    for row, item in enumerate(params):
        alone, logprob = draw(logits[row : row + 1].clone(), Drawing.of([item], CPU), given[row : row + 1])
        assert tokens[row] == alone[0]
        assert logprobs[row] == pytest.approx(float(logprob[0]), abs=1e-6)
    likeliest = logits.argmax(-1)
    assert tokens[[1, 4, 5]].tolist() == likeliest[[1, 4, 5]].tolist()


def test_a_row_of_nan_gets_a_nan_logprob_and_leaves_the_others_alone() -> None:
    logits = torch.stack([spread(600), torch.full((600,), math.nan), spread(600)])
    given = numbers(1).repeat(3)
    for params in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(temperature=0)):
        tokens, logprobs = draw(logits.clone(), Drawing.of([params] * 3, CPU), given)
        assert torch.isnan(logprobs).tolist() == [False, True, False]
        assert tokens[0] == tokens[2]
        assert 0 <= int(tokens[1]) < 600


def test_uniform_numbers_fill_the_unit_interval_evenly_and_do_not_repeat() -> None:
    key = torch.full((100_000,), stream_key(3, 0))
    drawn_numbers = uniforms(key, torch.arange(100_000))
    assert float(drawn_numbers.min()) >= 0
    assert float(drawn_numbers.max()) < 1
    counts = torch.bincount((drawn_numbers * 100).long(), minlength=100).double()
    statistic = float(((counts - 1000) ** 2 / 1000).sum())
    assert abs(statistic - 99) < 4 * math.sqrt(2 * 99)
    assert len(set(drawn_numbers.tolist())) == 100_000


def test_streams_differ_by_seed_and_by_sample() -> None:
    pairs = [(seed, sample) for seed in (-1, 0, 1, 2**70) for sample in range(50)]
    assert len({stream_key(*pair) for pair in pairs}) == len(pairs)


def test_total_logprob_equals_logsumexp() -> None:
    logits = torch.stack([spread(500), spread(500) + 1000])
    torch.testing.assert_close(total_logprob(logits), torch.logsumexp(logits, -1))
