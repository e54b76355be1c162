"""Requests that cannot be answered fail alone, before anything is computed, with an error that says what to do."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from shared.contracts.arrays import Int32s
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult
from shared.errors import UserError
from tests.engines.sampler_tools import StartAny, ask, decode
from tests.engines.tiny import VOCABULARY

REFUSED: list[tuple[SampleRequest, str]] = [
    (ask([]), "the prompt is empty"),
    (ask([1, VOCABULARY]), f"token id {VOCABULARY} in the prompt is outside"),
    (ask([1, -1]), "token id -1 in the prompt is outside"),
    (ask([1] * 60, max_tokens=5), "a prompt of 60 tokens and max_tokens 5 are more than the context of 64"),
    (ask([1] * 64, max_tokens=None), "a prompt of 64 tokens leaves no room"),
    (ask([1] * 100_000, max_tokens=0), "a prompt of 100000 tokens"),
    (ask([1], max_tokens=10**18), "max_tokens 1000000000000000000"),
    (ask([1], num_samples=9), "num_samples 9 is more than the 8 sequences"),
    (ask([1], num_samples=10**12), "num_samples 1000000000000 is more"),
    (ask([1], policy=PolicyRef(run="run", version=3)), "policy run@3 is not loaded"),
    (ask([1], base_model="other"), "base model 'other' is not served"),
    (ask([1], top_k=0), "top_k 0"),
    (ask([1], temperature=math.inf), "temperature inf"),
    (ask([1], temperature=math.nan), "temperature nan"),
    (ask([1], stop=[""]), "a stop string is empty"),
    (ask([1], stop=["x" * 5000]), "a stop string has more than"),
    (ask([1], stop=list(range(100)) * 100), "10000 stops are more than"),
    (ask([1], stop=[VOCABULARY]), f"token id {VOCABULARY} in stop is outside"),
    (ask([1, 2], target_logprobs=Int32s([VOCABULARY])), f"token id {VOCABULARY} in target_logprobs is outside"),
    (ask([1, 2], target_logprobs=Int32s([-2])), "token id -2 in target_logprobs is outside"),
    (ask([1, 2], target_logprobs=Int32s([1, 2])), "target_logprobs has 2 ids: .* 1 in all"),
]


class Refusals:
    """`check` and `generate` say the same."""

    @pytest.mark.parametrize(("request_", "message"), REFUSED)
    async def test_a_request_that_cannot_be_answered_is_refused_in_words(
        self, start: StartAny, request_: SampleRequest, message: str
    ) -> None:
        engine = await start(max_sequences=8, max_context=64, decode=decode)
        with pytest.raises(UserError, match=message):
            engine.check(request_)
        with pytest.raises(UserError, match=message):
            await engine.generate(request_)

    async def test_refused_requests_leave_others_alone(self, start: StartAny) -> None:
        engine = await start(max_sequences=8, max_context=64, decode=decode)
        mixed = [request for refused, _ in REFUSED for request in (refused, ask([1, 2, 3], owner="other"))]
        outcomes = await asyncio.gather(*map(engine.generate, mixed), return_exceptions=True)
        assert all(isinstance(outcome, UserError) for outcome in outcomes[::2])
        assert all(isinstance(outcome, SampleResult) for outcome in outcomes[1::2])

    @pytest.mark.parametrize(
        "settings",
        [
            {"top_k": 10**15},
            {"top_p": 1e-12},
            {"temperature": 1e-40},
            {"temperature": 1e300},
            {"seed": -(2**80)},
            {"temperature": 1e-40, "topk_sample_logprobs": 3},
        ],
    )
    async def test_extreme_but_sensible_parameters_are_answered(
        self, start: StartAny, settings: dict[str, Any]
    ) -> None:
        engine = await start()
        result = await engine.generate(ask([1, 2, 3], **settings))
        assert len(result.sequences[0].tokens) == 8
        assert all(map(math.isfinite, result.sequences[0].logprobs))
