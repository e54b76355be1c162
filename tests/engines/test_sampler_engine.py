"""The torch sampler engine against transformers and PEFT on tiny random models, and its behaviour under load."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.sampler.engines import kv_cache
from services.sampler.engines.batching import Shape
from services.sampler.engines.stops import stop_rule
from services.sampler.engines.torch_engine import TorchSamplerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec, PolicyRef
from shared.contracts.sampling import SampledSequence, SampleRequest, SampleResult, SamplingParams
from shared.errors import PermanentError, TemporaryError, UserError
from shared.models.adapter_files import to_peft
from shared.models.lora import Adapter
from tests.engines.tiny import CONTEXT, FAMILIES, IM_END, VOCABULARY, make_tiny_model

Start = Callable[..., Awaitable[TorchSamplerEngine]]
PROMPTS = [[5], [72, 101, 108, 108, 111], list(range(40, 75)), [3, 1, 4, 1, 5, 9, 2, 6], [200] * 21]


def decode(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture
async def start(directory: Path) -> AsyncIterator[Start]:
    """Start engines, and stop them when the test ends."""
    engines: list[TorchSamplerEngine] = []

    async def begin(model: Path = directory, **settings: Any) -> TorchSamplerEngine:
        engine = TorchSamplerEngine("tiny", str(model), **{"threads": 1, "cache_bytes": 1 << 28, **settings})
        engines.append(engine)
        await engine.start()
        return engine

    yield begin
    for engine in engines:
        await engine.stop()


def ask(prompt: Sequence[int], *, policy: PolicyRef | None = None, **settings: Any) -> SampleRequest:
    """Make a request; settings of `SampleRequest` go there and the others to `SamplingParams`."""
    own = {name: settings.pop(name) for name in ("num_samples", "prompt_logprobs", "isolated") if name in settings}
    params = SamplingParams(**{"stop": [], "max_tokens": 8, **settings})
    return SampleRequest(
        request_id="request", base_model="tiny", prompt=Int32s(prompt), policy=policy, params=params, **own
    )


async def together(engine: TorchSamplerEngine, requests: Sequence[SampleRequest]) -> list[SampleResult]:
    return await asyncio.gather(*(engine.generate(request) for request in requests))


def tokens(result: SampleResult) -> list[int]:
    assert len(result.sequences) == 1
    return result.sequences[0].tokens.tolist()


@torch.no_grad()
def continued(model: Any, prompt: Sequence[int], count: int, **settings: Any) -> list[int]:
    """Transformers' own greedy continuation of one prompt."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
        **{"eos_token_id": None, "pad_token_id": 0, **settings},
    )  # fmt: skip
    continuation: list[int] = out[0, len(prompt) :].tolist()
    return continuation


@torch.no_grad()
def logprobs_of(model: Any, prompt: Sequence[int], sampled: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of sampled tokens by one plain forward pass over everything."""
    logits = model(torch.tensor([[*prompt, *sampled]])).logits[0, len(prompt) - 1 : -1].float()
    found: Tensor = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(sampled)[:, None])[:, 0]
    return found


def policy_files(model: Any, seed: int, **spec: Any) -> tuple[Adapter, dict[str, bytes]]:
    """Make an adapter whose B is not zero, so that it changes what the model says."""
    adapter = Adapter.fresh(model, LoraSpec(rank=4, seed=seed, **spec))
    generator = torch.Generator().manual_seed(seed)
    for _, b in adapter.weights.values():
        b.normal_(generator=generator).mul_(0.1)
    return adapter, to_peft(adapter, "tiny")


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# What is generated


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


async def test_policies_in_one_batch_equal_peft_with_each_alone(start: Start, directory: Path, tmp_path: Path) -> None:
    engine = await start()
    models: dict[PolicyRef | None, Any] = {None: AutoModelForCausalLM.from_pretrained(directory).eval()}
    specs: list[dict[str, Any]] = [{}, {"train_mlp": False}, {"train_unembed": True, "alpha": 8.0}]
    for seed, spec in enumerate(specs):
        policy = PolicyRef(run="run", version=seed)
        base = AutoModelForCausalLM.from_pretrained(directory).eval()
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
    monkeypatch.setattr("services.sampler.engines.forward._LOGITS_AT_ONCE", 5 * VOCABULARY)
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


# Many requests


async def test_more_sequences_than_places_wait_and_finish(start: Start) -> None:
    engine = await start(max_sequences=4)
    seen: list[int] = []

    async def watch() -> None:
        while True:
            seen.append(engine.load().running)
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    asked = [ask(PROMPTS[at % 5], num_samples=1 + at % 4, max_tokens=10) for at in range(20)]
    results = await together(engine, asked)
    watcher.cancel()
    assert [len(result.sequences) for result in results] == [request.num_samples for request in asked]
    assert max(seen) <= 4
    assert results[-1].queue_seconds > 0
    assert results[-1].seconds > 0


async def test_a_short_request_overtakes_a_long_one_that_already_runs(start: Start, reference: Any) -> None:
    engine = await start()
    long = asyncio.create_task(engine.generate(ask(PROMPTS[0], max_tokens=CONTEXT - 1)))
    await eventually(lambda: engine.load().running == 1)
    short = await engine.generate(ask(PROMPTS[3], max_tokens=3, temperature=0))
    assert not long.done()
    assert tokens(short) == continued(reference, PROMPTS[3], 3)
    long.cancel()


async def test_requests_that_do_not_fit_into_memory_together_take_turns(start: Start, reference: Any) -> None:
    # 2 layers, keys and values, 2 heads of 8 float32: 256 bytes a position
    engine = await start(cache_bytes=256 * 160)
    assert engine.limits.positions == 160
    results = await together(engine, [ask(prompt, temperature=0, max_tokens=20) for prompt in PROMPTS * 3])
    for prompt, result in zip(PROMPTS * 3, results, strict=True):
        assert tokens(result) == continued(reference, prompt, 20)


async def test_cancelling_frees_the_place_for_those_who_wait(start: Start, reference: Any) -> None:
    engine = await start(max_sequences=3)
    endless = [asyncio.create_task(engine.generate(ask(PROMPTS[0], max_tokens=1000))) for _ in range(2)]
    waiting = asyncio.create_task(engine.generate(ask(PROMPTS[0], num_samples=3, max_tokens=1000)))
    await eventually(lambda: engine.load().running == 2 and engine.load().waiting == 3)
    later = asyncio.create_task(engine.generate(ask(PROMPTS[3], num_samples=2, temperature=0)))
    waiting.cancel()
    endless[0].cancel()
    result = await later
    assert result.sequences[0].tokens.tolist() == continued(reference, PROMPTS[3], 8)
    assert not endless[1].done()
    endless[1].cancel()
    await eventually(lambda: engine.load().running == engine.load().waiting == 0)
    assert [task.cancelled() for task in (*endless, waiting)] == [True, True, True]


async def test_a_policy_in_use_cannot_be_unloaded(start: Start, reference: Any) -> None:
    engine = await start()
    policy = PolicyRef(run="run", version=0)
    await engine.load_policy(policy, policy_files(reference, 0)[1])
    task = asyncio.create_task(engine.generate(ask(PROMPTS[0], policy=policy, max_tokens=CONTEXT - 1)))
    await eventually(lambda: engine.load().running == 1)
    with pytest.raises(TemporaryError, match="used by 1 request"):
        await engine.unload_policy(policy)
    assert engine.policies == {policy}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.unload_policy(policy)
    await engine.unload_policy(policy)
    assert engine.policies == frozenset()
    with pytest.raises(UserError, match="run@0 is not loaded"):
        await engine.generate(ask(PROMPTS[0], policy=policy))


async def test_policies_come_and_go_while_requests_run(start: Start, reference: Any) -> None:
    engine = await start(max_policies=2)
    first, second, third = (PolicyRef(run="run", version=version) for version in range(3))
    files = {policy: policy_files(reference, policy.version)[1] for policy in (first, second, third)}
    await engine.load_policy(first, files[first])
    stop = asyncio.Event()

    async def traffic() -> list[tuple[int, ...]]:
        answers = []
        while not stop.is_set():
            answers.append(tuple(tokens(await engine.generate(ask(PROMPTS[2], policy=first, temperature=0)))))
        return answers

    busy = [asyncio.create_task(traffic()) for _ in range(3)]
    await engine.load_policy(second, files[second])
    await engine.load_policy(second, files[second])
    with pytest.raises(TemporaryError, match="2 policies are loaded"):
        await engine.load_policy(third, files[third])
    before = tokens(await engine.generate(ask(PROMPTS[2], policy=second, temperature=0)))
    await engine.unload_policy(second)
    await engine.load_policy(third, files[third])
    after = tokens(await engine.generate(ask(PROMPTS[2], policy=third, temperature=0)))
    stop.set()
    answers = {answer for task in busy for answer in await task}
    assert engine.policies == {first, third}
    assert len(answers | {tuple(before), tuple(after)}) == 3
    assert len(answers) == 1


# Errors


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask([]), "the prompt is empty"),
        (ask([1, VOCABULARY]), f"token id {VOCABULARY} in the prompt is outside"),
        (ask([1, -1]), "token id -1 in the prompt is outside"),
        (ask([1] * 60, max_tokens=5), "a prompt of 60 tokens and max_tokens 5 are more than the context of 64"),
        (ask([1] * 64, max_tokens=None), "a prompt of 64 tokens leaves no room"),
        (ask([1], num_samples=9), "num_samples 9 is more than the 8 sequences"),
        (ask([1], num_samples=8, max_tokens=40), "8 samples of up to 48 tokens are more than the 256 that fit"),
        (ask([1], policy=PolicyRef(run="run", version=3)), "policy run@3 is not loaded"),
        (ask([1], top_k=0), "top_k 0"),
        (ask([1], stop=["x"]), "need a tokenizer"),
        (ask([1], stop=[""]), "a stop string is empty"),
        (SampleRequest(request_id="r", base_model="other", prompt=Int32s([1])), "base model 'other' is not served"),
    ],
)
async def test_a_request_that_cannot_be_answered_is_refused_in_words(
    start: Start, request_: SampleRequest, message: str
) -> None:
    engine = await start(max_sequences=8, max_context=64, cache_bytes=256 * 256)
    with pytest.raises(UserError, match=message):
        engine.check(request_)
    with pytest.raises(UserError, match=message):
        await engine.generate(request_)


async def test_files_that_do_not_fit_the_model_are_refused(start: Start) -> None:
    engine = await start()
    with pytest.raises(PermanentError):
        await engine.load_policy(PolicyRef(run="run", version=0), {"adapter_config.json": b"{}"})
    assert engine.policies == frozenset()


async def test_a_policy_that_overflows_fails_only_its_own_requests(start: Start, reference: Any) -> None:
    engine = await start(max_sequences=8)
    bad, good = PolicyRef(run="bad", version=0), PolicyRef(run="good", version=0)
    adapter, _ = policy_files(reference, 0)
    for _, b in adapter.weights.values():
        b.mul_(1e30)
    await engine.load_policy(bad, to_peft(adapter, "tiny"))
    await engine.load_policy(good, policy_files(reference, 1)[1])
    poison = ask(PROMPTS[2], policy=bad, temperature=0, max_tokens=30)
    short = ask(PROMPTS[0], policy=good, temperature=0, max_tokens=30)
    alone = await engine.generate(short)
    for _ in range(3):  # the places that the failed ones leave, longer than needed, are used by the others
        asked = [poison, short] * 4
        outcomes = await asyncio.gather(*(engine.generate(request) for request in asked), return_exceptions=True)
        for outcome in outcomes[::2]:
            assert isinstance(outcome, PermanentError)
            assert "policy bad@0 gives logits that are not finite" in str(outcome)
        for outcome in outcomes[1::2]:
            assert isinstance(outcome, SampleResult)
            assert tokens(outcome) == tokens(alone)


async def test_a_prompt_that_cannot_be_computed_fails_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start()
    forward = engine._alive().built.forward
    usual = forward.prefill

    def broken(ids: Tensor, *rest: Any) -> Tensor:
        if (ids == 200).any():
            raise ValueError("200 is cursed")
        return usual(ids, *rest)

    monkeypatch.setattr(forward, "prefill", broken)
    outcomes = await asyncio.gather(*(engine.generate(ask(p)) for p in PROMPTS), return_exceptions=True)
    assert [isinstance(outcome, SampleResult) for outcome in outcomes] == [True, True, True, True, False]
    assert "200 is cursed" in str(outcomes[4])


async def test_a_failed_step_fails_those_who_took_part_and_the_next_are_served(
    start: Start, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start(max_sequences=3)
    forward = engine._alive().built.forward
    usual = forward.decode

    def broken(*_: Any) -> Tensor:
        monkeypatch.setattr(forward, "decode", usual)
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    running = asyncio.create_task(engine.generate(ask(PROMPTS[0], num_samples=3, max_tokens=CONTEXT - 1)))
    await eventually(lambda: engine.load().running == 3)
    waiting = asyncio.create_task(engine.generate(ask(PROMPTS[3], temperature=0)))
    await eventually(lambda: engine.load().waiting == 1)
    monkeypatch.setattr(forward, "decode", broken)
    with pytest.raises(TemporaryError, match="ran out of memory while computing the next tokens: tried to allocate"):
        await running
    assert tokens(await waiting) == continued(reference, PROMPTS[3], 8)


async def test_memory_that_runs_out_while_the_cache_grows_leaves_it_usable(
    start: Start, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start(max_sequences=32)
    running = asyncio.create_task(engine.generate(ask(PROMPTS[3], temperature=0, max_tokens=40)))
    await eventually(lambda: engine.load().running == 1)
    usual, calls = kv_cache._zeros, iter(range(100))

    def scarce(like: Tensor, shape: Shape) -> Tensor:
        if next(calls) == 2:  # the first two of four tensors have grown
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return usual(like, shape)

    monkeypatch.setattr(kv_cache, "_zeros", scarce)
    with pytest.raises(TemporaryError, match="tried to allocate 1 TiB"):
        await engine.generate(ask(PROMPTS[2], num_samples=31))
    assert tokens(await running) == continued(reference, PROMPTS[3], 40)
    results = await together(engine, [ask(prompt, temperature=0, max_tokens=80) for prompt in PROMPTS])
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert tokens(result) == continued(reference, prompt, 80)


async def test_a_decoder_that_raises_fails_only_its_own_request(start: Start) -> None:
    def cursed(tokens: Sequence[int]) -> str:
        raise ValueError(f"cannot decode {len(tokens)} tokens")

    engine = await start(decode=cursed)
    failed, fine = await asyncio.gather(
        engine.generate(ask(PROMPTS[0], stop=["x"])), engine.generate(ask(PROMPTS[1])), return_exceptions=True
    )
    assert "cannot decode" in str(failed)
    assert isinstance(fine, SampleResult)


async def test_a_dead_worker_is_said_to_everybody_and_nobody_hangs(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start()

    def dies() -> None:
        raise SystemError("a defect")

    monkeypatch.setattr(engine._alive().built.generation, "decode", dies)
    async with asyncio.timeout(10):
        with pytest.raises(TemporaryError, match="worker has died"):
            await engine.generate(ask(PROMPTS[0]))
        with pytest.raises(TemporaryError, match="worker has died"):
            await engine.generate(ask(PROMPTS[0]))
        with pytest.raises(TemporaryError, match="worker has died"):
            await engine.load_policy(PolicyRef(run="run", version=0), {})


async def test_stopping_cancels_what_runs_and_what_waits(start: Start) -> None:
    engine = await start(max_sequences=1)
    tasks = [asyncio.create_task(engine.generate(ask(PROMPTS[0], max_tokens=1000))) for _ in range(2)]
    await eventually(lambda: engine.load().running == 1)
    await engine.stop()
    await engine.stop()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in tasks] == [True, True]
    with pytest.raises(TemporaryError, match="not running"):
        engine.check(ask(PROMPTS[0]))


async def test_a_model_that_is_not_there_is_a_users_error(start: Start, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        await start(tmp_path / "nowhere")


async def test_a_model_that_the_engine_would_compute_wrongly_is_refused(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "services.sampler.engines.forward.Forward.logits", lambda self, hidden, segments: self._head(hidden) * 1.01
    )
    with pytest.raises(UserError, match="logits differ by"):
        await start()
