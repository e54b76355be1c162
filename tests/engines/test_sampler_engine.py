"""What the torch sampler generates, against transformers and PEFT on tiny random models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.sampler.engines.stops import stop_rule
from shared.contracts.policies import PolicyRef
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
from tests.engines.tiny import FAMILIES, IM_END, VOCABULARY, make_tiny_model


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_equals_transformers_for_ragged_prompts(family: str, tmp_path: Path, start: Start) -> None:
    model = make_tiny_model(tmp_path / family, family=family)
    reference = AutoModelForCausalLM.from_pretrained(model).eval()
    engine = await start(model)
    results = await together(engine, [ask(prompt, temperature=0, max_tokens=20) for prompt in PROMPTS])
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert tokens(result) == continued(reference, prompt, 20)


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


# Where samples end


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


# Scores of the prompt


async def test_prompt_logprobs_are_computed_in_chunks(
    start: Start, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sampler.engines.scoring.LOGITS_AT_ONCE", 5 * VOCABULARY)
    engine = await start()
    result = await engine.generate(ask(PROMPTS[2], prompt_logprobs=True, max_tokens=0))
    expected = logprobs_of(reference, PROMPTS[2][:1], PROMPTS[2][1:])
    torch.testing.assert_close(torch.tensor(result.prompt_logprobs)[1:], expected, atol=1e-4, rtol=0)
