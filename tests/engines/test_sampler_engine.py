"""What the torch sampler generates, against transformers and PEFT on tiny random models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.sampler.engines.stops import stop_rule
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampledSequence
from tests.engines.sampler_tools import (
    PROMPTS,
    Start,
    ask,
    continued,
    decode,
    logprobs_of,
    policy_files,
    together,
    tokens,
)
from tests.engines.tiny import CONTEXT, FAMILIES, IM_END, VOCABULARY, make_tiny_model


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_equals_transformers_for_ragged_prompts(family: str, tmp_path: Path, start: Start) -> None:
    model = make_tiny_model(tmp_path / family, family=family)
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    engine = await start(model)
    results = await together(engine, [ask(prompt, temperature=0, max_tokens=20) for prompt in PROMPTS])
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert tokens(result) == continued(reference, prompt, 20)


async def test_rows_that_end_at_different_times_leave_the_others_right(start: Start, reference: Any) -> None:
    engine = await start(max_sequences=6)
    lengths = [1, 30, 2, 17, 9, 25, 3, 40, 5, 12, 21, 70]
    asked = [(PROMPTS[index % len(PROMPTS)], count) for index, count in enumerate(lengths)]
    results = await together(engine, [ask(prompt, temperature=0, max_tokens=count) for prompt, count in asked])
    for (prompt, count), result in zip(asked, results, strict=True):
        assert tokens(result) == continued(reference, prompt, count)
    assert engine.load().running == engine.load().waiting == 0
    assert engine.load().sampled_tokens == sum(lengths)
    assert engine.load().prompt_tokens == sum(len(prompt) for prompt, _ in asked)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_logprobs_equal_a_plain_forward_pass(start: Start, reference: Any, temperature: float) -> None:
    engine = await start()
    asked = [ask(prompt, temperature=temperature, num_samples=3, top_k=40, max_tokens=12) for prompt in PROMPTS]
    for request, result in zip(asked, await together(engine, asked), strict=True):
        assert len(result.sequences) == 3
        for sequence in result.sequences:
            expected = logprobs_of(reference, request.prompt, sequence.tokens.tolist(), temperature or 1.0)
            torch.testing.assert_close(torch.tensor(sequence.logprobs), expected, atol=1e-4, rtol=0)


async def test_policies_in_one_batch_equal_peft_with_each_alone(
    start: Start, sampler_model: Path, tmp_path: Path
) -> None:
    engine = await start()
    models: dict[PolicyRef | None, Any] = {None: AutoModelForCausalLM.from_pretrained(sampler_model).eval()}
    specs: list[dict[str, Any]] = [{}, {"train_mlp": False}, {"train_unembed": True, "alpha": 8.0}]
    for seed, spec in enumerate(specs):
        policy = PolicyRef(run="run", version=seed)
        base = AutoModelForCausalLM.from_pretrained(sampler_model).eval()
        _, files = policy_files(base, seed, **spec)
        for name, content in files.items():
            folder = tmp_path / str(seed)
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        await engine.load_policy(policy, files)
        models[policy] = PeftModel.from_pretrained(base, tmp_path / str(seed))
    asked = [(prompt, named, 5 + at) for at, prompt in enumerate(PROMPTS) for named in models]
    results = await together(
        engine, [ask(prompt, policy=named, temperature=0, max_tokens=count) for prompt, named, count in asked]
    )
    for (prompt, named, count), result in zip(asked, results, strict=True):
        model = models[named]
        assert result.policy == named
        assert tokens(result) == continued(model, prompt, count), str(named)
        expected = logprobs_of(model, prompt, tokens(result))
        torch.testing.assert_close(torch.tensor(result.sequences[0].logprobs), expected, atol=1e-4, rtol=0)
    same_prompt = {tuple(tokens(r)) for (prompt, _, _), r in zip(asked, results, strict=True) if prompt == PROMPTS[2]}
    assert len(same_prompt) == len(models)


async def test_rows_of_one_policy_are_computed_side_by_side(
    start: Start, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start()
    policies = [PolicyRef(run="run", version=version) for version in range(2)]
    for policy in policies:
        await engine.load_policy(policy, policy_files(reference, policy.version)[1])
    forward = engine._alive().built.forward
    usual, seen = forward.decode, []

    def spied(tokens: Tensor, step: Any, segments: Sequence[Any]) -> Tensor:
        seen.append((len(tokens), len(segments)))
        return usual(tokens, step, segments)

    monkeypatch.setattr(forward, "decode", spied)
    mixed: list[PolicyRef | None] = [policies[0], None, policies[1]] * 4
    await together(engine, [ask(PROMPTS[0], policy=each, max_tokens=9 + at) for at, each in enumerate(mixed)])
    assert max(rows for rows, _ in seen) > 6
    assert max(segments for _, segments in seen) <= 3


async def test_the_frequency_of_each_token_follows_the_softmax(start: Start, reference: Any) -> None:
    engine = await start(max_sequences=512)
    asked = [ask(PROMPTS[1], num_samples=512, max_tokens=2, temperature=1.5, seed=seed) for seed in range(8)]
    sequences = [sequence for result in await together(engine, asked) for sequence in result.sequences]
    with torch.no_grad():
        logits = reference(torch.tensor([PROMPTS[1]])).logits[0, -1]
    expected = torch.softmax(logits / 1.5, -1) * len(sequences)
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in sequences]), minlength=VOCABULARY)
    common = expected >= 5
    statistic = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    freedom = int(common.sum())
    assert freedom > 50
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


async def test_top_k_and_top_p_bound_what_is_drawn(start: Start, reference: Any) -> None:
    engine = await start()
    with torch.no_grad():
        probabilities, order = torch.softmax(reference(torch.tensor([PROMPTS[1]])).logits[0, -1], -1).sort(
            descending=True
        )
    nucleus = int((probabilities.cumsum(0) < 0.5).sum()) + 1
    requests = [
        ask(PROMPTS[1], num_samples=128, max_tokens=1, top_k=3, seed=0),
        ask(PROMPTS[1], num_samples=128, max_tokens=1, top_p=0.5, seed=0),
    ]
    by_k, by_p = [{s.tokens[0] for s in r.sequences} for r in await together(engine, requests)]
    assert by_k == set(order[:3].tolist())
    assert by_p <= set(order[:nucleus].tolist())
    assert len(by_p) > nucleus // 2


# Seeds and isolation


async def test_a_seed_gives_the_same_samples_whatever_else_is_computed(start: Start) -> None:
    engine = await start()
    request = ask(PROMPTS[3], seed=11, num_samples=4, max_tokens=16)
    alone = await engine.generate(request)
    others = [ask(prompt, num_samples=3, max_tokens=30) for prompt in PROMPTS]
    *_, among = await together(engine, [*others, request])
    assert [s.tokens for s in alone.sequences] == [s.tokens for s in among.sequences]


async def test_samples_of_a_request_and_requests_without_a_seed_differ(start: Start) -> None:
    engine = await start()
    seeded, first, second = await together(
        engine, [ask(PROMPTS[3], num_samples=8, max_tokens=16, seed=seed) for seed in (1, None, None)]
    )
    everything = [tuple(s.tokens) for result in (seeded, first, second) for s in result.sequences]
    assert len(set(everything)) == 24


async def test_the_first_samples_do_not_depend_on_how_many_are_asked(start: Start) -> None:
    engine = await start()
    few, many = await together(engine, [ask(PROMPTS[3], num_samples=n, seed=5) for n in (2, 6)])
    assert [s.tokens for s in few.sequences] == [s.tokens for s in many.sequences[:2]]


async def test_isolated_results_are_bitwise_independent_of_traffic(start: Start, reference: Any) -> None:
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


# Where samples end


async def test_a_sample_ends_at_the_models_own_token_unless_told_otherwise(start: Start, reference: Any) -> None:
    engine = await start()
    usual = await engine.generate(ask(PROMPTS[4], num_samples=64, max_tokens=100, seed=1, temperature=2, stop=None))
    endless = await engine.generate(ask(PROMPTS[4], num_samples=64, max_tokens=100, seed=1, temperature=2, stop=[]))
    for with_stop, without in zip(usual.sequences, endless.sequences, strict=True):
        assert len(without.tokens) == 100
        assert without.stop_reason == "length"
        end = without.tokens.index(IM_END) + 1 if IM_END in without.tokens else 100
        assert with_stop.tokens == without.tokens[:end]
        assert with_stop.stop_reason == ("stop" if IM_END in without.tokens else "length")
        assert len(with_stop.logprobs) == end
    assert {s.stop_reason for s in usual.sequences} == {"stop", "length"}


async def test_a_sample_ends_with_the_first_of_several_stop_ids(start: Start) -> None:
    engine = await start()
    endless = await engine.generate(ask(PROMPTS[0], temperature=0, max_tokens=30))
    said = tokens(endless)
    some = said[7], said[20]
    stopped = await engine.generate(ask(PROMPTS[0], temperature=0, max_tokens=30, stop=list(some)))
    first = min(said.index(token) for token in some)
    assert tokens(stopped) == said[: first + 1]
    assert stopped.sequences[0].stop_reason == "stop"
    assert len(stopped.sequences[0].logprobs) == first + 1


async def test_a_sample_may_end_with_its_first_token(start: Start) -> None:
    engine = await start()
    said = tokens(await engine.generate(ask(PROMPTS[0], temperature=0)))
    stopped = await engine.generate(ask(PROMPTS[0], temperature=0, stop=said[:1]))
    assert tokens(stopped) == said[:1]


async def test_a_sample_ends_with_the_token_that_completes_a_string(start: Start) -> None:
    engine = await start(decode=decode)
    letters: dict[str, Any] = {"temperature": 3.0, "max_tokens": 100, "seed": 4, "num_samples": 16}
    endless = await engine.generate(ask(PROMPTS[1], **letters))
    stopped = await engine.generate(ask(PROMPTS[1], **letters, stop=["ab", "\x00", "Q"]))
    for with_stop, without in zip(stopped.sequences, endless.sequences, strict=True):
        text = [decode(without.tokens[:count]) for count in range(101)]
        ends = [count for count in range(101) if any(s in text[count] for s in ("ab", "\x00", "Q"))]
        assert with_stop.tokens == without.tokens[: min(ends, default=100)]
        assert with_stop.stop_reason == ("stop" if ends else "length")
    assert any(s.stop_reason == "stop" for s in stopped.sequences)


@pytest.mark.parametrize("string", ["ing", "é", "…n", "\n\n"])
def test_a_string_is_found_when_its_last_token_arrives_and_not_before(string: str) -> None:
    rule = stop_rule([string], frozenset(), decode)
    said = list(b"a long beginning is" * 9) + [IM_END] * 5
    completing = list(string.encode())
    if string == "ing":
        said = [token for token in said if token != ord("g")]
    for count in range(1, len(completing)):
        assert not rule.ends(said + completing[:count])
    assert rule.ends(said + completing)


async def test_strings_and_ids_may_be_mixed(start: Start) -> None:
    engine = await start(decode=decode)
    said = tokens(await engine.generate(ask(PROMPTS[0], temperature=0, max_tokens=30)))
    at = next(at for at in range(5, 30) if said[at] < 128)
    stopped = await engine.generate(ask(PROMPTS[0], temperature=0, max_tokens=30, stop=[chr(said[at]), IM_END]))
    assert tokens(stopped) == said[: said.index(said[at]) + 1]


async def test_without_max_tokens_a_sample_fills_the_context(start: Start) -> None:
    engine = await start(max_context=50)
    prompt = PROMPTS[2]
    result = await engine.generate(ask(prompt, max_tokens=None))
    assert len(tokens(result)) == 50 - len(prompt)
    assert result.sequences[0].stop_reason == "length"


async def test_the_whole_context_can_be_used(start: Start, reference: Any) -> None:
    engine = await start()
    prompt = [at % 250 for at in range(CONTEXT - 3)]
    result = await engine.generate(ask(prompt, max_tokens=3, temperature=0))
    assert tokens(result) == continued(reference, prompt, 3)


# Scores of the prompt


async def test_prompt_logprobs_equal_a_plain_forward_pass(start: Start, reference: Any) -> None:
    engine = await start()
    asked = [ask(p, prompt_logprobs=True, max_tokens=4, temperature=0.3) for p in PROMPTS]
    for request, result in zip(asked, await together(engine, asked), strict=True):
        found = torch.tensor(result.prompt_logprobs)
        assert len(found) == len(request.prompt)
        assert math.isnan(found[0])
        expected = logprobs_of(reference, request.prompt[:1], request.prompt[1:].tolist())
        torch.testing.assert_close(found[1:], expected, atol=1e-4, rtol=0)


async def test_prompt_logprobs_are_computed_in_chunks(
    start: Start, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sampler.engines.scoring.LOGITS_AT_ONCE", 5 * VOCABULARY)
    engine = await start()
    result = await engine.generate(ask(PROMPTS[2], prompt_logprobs=True, max_tokens=0))
    expected = logprobs_of(reference, PROMPTS[2][:1], PROMPTS[2][1:])
    torch.testing.assert_close(torch.tensor(result.prompt_logprobs)[1:], expected, atol=1e-4, rtol=0)


async def test_zero_tokens_only_score_the_prompt(start: Start) -> None:
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


async def test_a_prompt_is_computed_once_for_all_of_its_samples(start: Start) -> None:
    engine = await start()
    await engine.generate(ask(PROMPTS[2], num_samples=7))
    assert engine.load().prompt_tokens == len(PROMPTS[2])
