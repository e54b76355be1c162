"""What a SamplingClient samples and scores; copies of it; what it hears while it waits."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.engines.tiny import IM_END, IM_START, PAD
from tests.mesh.gateways import announce, sampled
from tests.mesh.harness import MODEL
from tests.mesh.sdk.data import CLOSE, OTHERS, TOKENS, Reference, learn, prompt, scores
from tests.mesh.sdk.declared import DEPRECATED_TOO, differs, means
from tests.mesh.sdk.world import SECONDS, User, wait

pytestmark = DEPRECATED_TOO

WITH_A_OR_B = (ord("a"), ord("b"), IM_START, PAD)
"""Tokens whose text, as `<|im_start|>` is one, has either letter in it."""
SAMPLE = ("SamplingClient.sample", "SamplingClient.sample_async")


def draw(sampler: tinker.SamplingClient, count: int = 1, **params: Any) -> list[types.SampledSequence]:
    given = {"max_tokens": 8, "stop": [], **params}
    return list(sampler.sample(prompt(), count, types.SamplingParams(**given)).result(SECONDS).sequences)


@means(
    "log-probability of each token of the prompt, as transformers has it, None for the first; `prompt_logprobs_last_n` "
    "only the last ones",
    "SamplingClient.compute_logprobs",
    "SamplingClient.compute_logprobs_async",
)
def test_scores_are_those_of_the_model(user: User, model: Reference) -> None:
    sampler, expected = user.base(), model.scores(TOKENS)
    found = sampler.compute_logprobs(prompt()).result()
    assert found[0] is None
    assert found[1:] == pytest.approx(expected, abs=CLOSE)
    last = wait(sampler.compute_logprobs_async(prompt(), prompt_logprobs_last_n=2))
    assert last[:4] == [None] * 4
    assert last[4:] == pytest.approx(expected[-2:], abs=CLOSE)


@means(
    "temperature 0 takes the likeliest token each time; log-probabilities of sampled tokens are those of the "
    "distribution that they were drawn from, at any temperature; ids of sequences are distinct",
    *SAMPLE,
)
def test_sampled_tokens_come_with_their_log_probabilities(user: User, model: Reference) -> None:
    sampler = user.base()
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    greedy = wait(sampler.sample_async(prompt(), 1, params)).sequences[0]
    tokens = list(TOKENS)
    for _ in range(4):
        tokens.append(int(model.table(tokens)[-1].argmax()))
    assert greedy.tokens == tokens[len(TOKENS) :]
    assert greedy.stop_reason == "length"
    warm = draw(sampler, 4, temperature=0.5, max_tokens=6)
    assert len({each.sequence_id for each in warm}) == 4
    assert len({tuple(each.tokens) for each in warm}) > 1
    for sequence in warm:
        table = torch.log_softmax(model.table([*TOKENS, *sequence.tokens]) / 0.5, -1)
        places = range(len(TOKENS) - 1, len(TOKENS) + len(sequence.tokens) - 1)
        expected = [table[place, token].item() for place, token in zip(places, sequence.tokens, strict=True)]
        assert sequence.logprobs == pytest.approx(expected, abs=CLOSE)


@means("one seed gives one result, another seed another; top_k and top_p leave only what they should", SAMPLE[0])
def test_settings_of_sampling_do_what_they_say(user: User, model: Reference) -> None:
    sampler = user.base()
    same = [draw(sampler, seed=5)[0].tokens for _ in range(2)]
    assert same[0] == same[1]
    assert draw(sampler, seed=6)[0].tokens != same[0]
    likely = model.table(TOKENS)[-1].sort(descending=True)
    few = {each.tokens[0] for each in draw(sampler, 40, top_k=2, max_tokens=1)}
    assert few <= set(likely.indices[:2].tolist())
    share = likely.values.exp().cumsum(0)
    kept = int((share < 0.3).sum()) + 1
    some = {each.tokens[0] for each in draw(sampler, 40, top_p=0.3, max_tokens=1)}
    assert some <= set(likely.indices[:kept].tolist())


@means(
    "stop at a token, a text or several; the stop token is in the result once; without any the end of the turn "
    "stops; an empty list stops at nothing",
    SAMPLE[0],
)
def test_sampling_stops_where_it_should(user: User) -> None:
    sampler = user.base()
    free = draw(sampler, temperature=0.0, max_tokens=12)[0].tokens
    token = free[3]
    first = free.index(token) + 1
    for stop in ([token], [260, token]):
        sequence = draw(sampler, temperature=0.0, max_tokens=12, stop=stop)[0]
        assert (sequence.tokens, sequence.stop_reason) == (free[:first], "stop")
    letters = draw(sampler, 64, seed=3, max_tokens=12, stop=["a", "b"])
    for sequence in letters:
        ends = [place for place, each in enumerate(sequence.tokens) if each in WITH_A_OR_B]
        assert ends in ([], [len(sequence.tokens) - 1])
        assert sequence.stop_reason == ("stop" if ends else "length")
    assert any(each.stop_reason == "stop" for each in letters)
    turns = draw(sampler, 64, seed=4, max_tokens=60, stop=None)
    ended = [each for each in turns if each.stop_reason == "stop"]
    assert ended
    assert all(each.tokens.count(IM_END) == 1 and each.tokens[-1] == IM_END for each in ended)
    on = draw(sampler, 64, seed=4, max_tokens=60)
    assert all(each.stop_reason == "length" and len(each.tokens) == 60 for each in on)


@means(
    "prompt log-probabilities, the likeliest tokens of each place of prompt and sample, and any ids asked for, dense "
    "or sparse: all as in transformers",
    SAMPLE[0],
)
def test_tables_of_log_probabilities_are_those_of_the_model(user: User, model: Reference) -> None:
    sampler, table = user.base(), model.table(TOKENS)
    wanted = torch.tensor([[6, -1], [-1, -1], [8, 3], [9, 9], [-1, 250]])
    for target in (types.TensorData.from_torch(wanted), types.TensorData.from_torch_sparse(wanted, pad_value=-1)):
        found = sampler.sample(
            prompt(),
            1,
            types.SamplingParams(max_tokens=2, stop=[]),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=3,
            topk_sample_logprobs=2,
            target_prompt_logprobs=target,
        ).result(SECONDS)
        assert found.prompt_logprobs is not None
        assert found.prompt_logprobs[1:] == pytest.approx(model.scores(TOKENS), abs=CLOSE)
        assert found.topk_prompt_logprobs is not None
        assert found.topk_prompt_logprobs[0] is None
        for place, top in enumerate(found.topk_prompt_logprobs[1:]):
            best = table[place].topk(3)
            assert top is not None
            assert [token for token, _ in top] == best.indices.tolist()
            assert [score for _, score in top] == pytest.approx(best.values.tolist(), abs=CLOSE)
        sequence = found.sequences[0]
        assert sequence.topk_logprobs is not None
        first = sequence.topk_logprobs[0]
        assert first is not None
        assert [token for token, _ in first] == table[-1].topk(2).indices.tolist()
        assert found.target_prompt_logprobs is not None
        scored = found.target_prompt_logprobs.to_torch()
        scored = scored.to_dense() if scored.layout != torch.strided else scored
        asked = wanted >= 0
        expected = table[:-1].gather(1, wanted.clamp(min=0)).float()
        assert torch.allclose(scored[asked], expected[asked], atol=CLOSE)
        assert not scored[~asked].any()


@differs(
    "`prompt_alt_tokens_k`",
    "refused with an error that names another way: sample one token from each prefix",
)
@differs("`prompt_cache_hit_tokens`", "always 0: what engines find in their caches is not told")
def test_alternatives_to_prompt_tokens_are_refused(user: User) -> None:
    sampler = user.base()
    with pytest.raises(tinker.BadRequestError, match="prompt_alt_tokens_k"):
        sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=1), prompt_alt_tokens_k=2).result(SECONDS)
    for _ in range(2):
        found = sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=1)).result(SECONDS)
        assert found.prompt_cache_hit_tokens == 0


@means(
    "a client of a given session's sampler, or a new one; the base model's name without a question to the server",
    "SamplingClient.create",
    "SamplingClient.get_base_model",
    "SamplingClient.get_base_model_async",
)
def test_a_client_of_a_sampler_that_is_there(user: User) -> None:
    training = user.train()
    learn(training)
    sampler = training.save_weights_and_get_sampling_client().result(SECONDS)
    same = tinker.SamplingClient.create(user.service.holder, sampling_session_id=sampler._sampling_session_id)
    again = same.result(SECONDS)
    assert again.get_base_model() == wait(again.get_base_model_async()) == MODEL
    assert scores(again, OTHERS) == pytest.approx(scores(sampler, OTHERS), abs=CLOSE)
    fresh = tinker.SamplingClient.create(user.service.holder, base_model=MODEL).result(SECONDS)
    assert fresh._sampling_session_id != sampler._sampling_session_id


CHILD = """
import json, pickle, sys
import tinker
from tinker import types
given = pickle.load(sys.stdin.buffer)
clients = [pickle.loads(given["pickled"])]
clients += [tinker.SamplingClient.from_sampler_handle(given["handle"], api_key=given["key"]) for _ in range(2)]
prompt = types.ModelInput.from_ints(given["tokens"])
params = types.SamplingParams(max_tokens=3, stop=[])
futures = [(client.compute_logprobs(prompt), client.sample(prompt, 1, params)) for client in clients]
print(json.dumps([(one.result()[1:], two.result().sequences[0].sequence_id) for one, two in futures]))
"""


@means(
    "pickled, or by a handle that carries no key: clients in another process sample the same weights, and no two of "
    "them get in each other's way",
    "SamplingClient.get_sampler_handle",
    "SamplingClient.from_sampler_handle",
)
def test_copies_in_another_process_sample_the_same_weights(user: User) -> None:
    training = user.train()
    learn(training)
    sampler = training.save_weights_and_get_sampling_client().result(SECONDS)
    expected, handle = scores(sampler), sampler.get_sampler_handle()
    assert user.key not in handle
    here = tinker.SamplingClient.from_sampler_handle(handle, api_key=user.key)
    assert scores(here) == pytest.approx(expected, abs=CLOSE)
    given = {"pickled": pickle.dumps(sampler), "handle": handle, "key": user.key, "tokens": TOKENS}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=pickle.dumps(given), capture_output=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    there = json.loads(done.stdout)
    for found, _ in there:
        assert found == pytest.approx(expected, abs=CLOSE)
    own = draw(sampler)[0].sequence_id
    assert len({own, *(sequence for _, sequence in there)}) == 4


@means("the tokenizer that the model's name leads to", "SamplingClient.get_tokenizer")
@differs(
    "`SamplingClient.get_tokenizer`",
    "the SDK looks the model's name up by itself, in the working directory and on the hub: give models names under "
    "which their tokenizers are found. `TrainingClient.get_tokenizer` asks the gateway, which names the model's own "
    "directory",
)
def test_a_sampler_finds_the_tokenizer_by_the_name_of_its_model(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = user.base()
    place = user.world.model_dir.parent / "by-name"
    (place / MODEL).parent.mkdir(parents=True, exist_ok=True)
    if not (place / MODEL).exists():
        (place / MODEL).symlink_to(user.world.model_dir, target_is_directory=True)
    monkeypatch.chdir(place)
    tokenizer = sampler.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    assert tokenizer.eos_token_id == IM_END


@means(
    "while no sampler of the model runs it hears `paused_capacity` with the reason; once there is an answer, the "
    "result",
    "SamplingClient.on_queue_state_change",
)
def test_a_client_that_waits_hears_why(user: User) -> None:
    from shared import topology

    model = f"absent/{user.tenant}"
    user.world.do(lambda bus: announce(bus, model))
    service = user.another(url=user.world.impatient_url)

    def client() -> tinker.SamplingClient:
        while True:
            with contextlib.suppress(tinker.BadRequestError):  # the gateway has not yet heard of the replica
                return service.create_sampling_client(base_model=model).result(SECONDS)

    sampler = client()
    user.world.do(lambda bus: bus.table(topology.REPLICAS).delete(f"sampler-{model}"))
    heard: list[tuple[str, str | None]] = []
    tell = sampler.on_queue_state_change

    def hear(state: Any, reason: str | None) -> None:
        heard.append((state.value, reason))
        tell(state, reason)

    sampler.on_queue_state_change = hear  # type: ignore[method-assign, assignment]
    waiting = sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=2))
    while not any(state == "paused_capacity" for state, _ in heard):
        assert not waiting.future().done()
        time.sleep(0.02)
    reason = next(reason for state, reason in heard if state == "paused_capacity")
    assert reason == f"no sampler of {model} is running"
    session = sampler.holder.get_session_id()
    number = sampler._sampling_session_id.rsplit(":", 1)[1]
    user.world.do(lambda bus: bus.answer(sampled(f"{session}.sample-{number}.0", [7, 8])))
    assert waiting.result(SECONDS).sequences[0].tokens == [7, 8]


@means("mistakes are refused at once with a message that names the value and the rule", SAMPLE[0])
@pytest.mark.parametrize(
    ("tokens", "params", "says"),
    [
        ([], {}, "empty"),
        (TOKENS, {"max_tokens": -1}, "max_tokens"),
        (TOKENS, {"temperature": -1.0}, "temperature"),
        (TOKENS, {"top_p": 0.0}, "top_p"),
        ([999_999], {}, "999999"),
        (TOKENS * 200, {}, "1024"),
    ],
    ids=["empty", "no-tokens", "temperature", "top-p", "unknown-token", "too-long"],
)
def test_impossible_requests_are_refused(user: User, tokens: list[int], params: dict[str, Any], says: str) -> None:
    sampler = user.base()
    given = types.SamplingParams(**{"max_tokens": 2, **params})
    with pytest.raises((tinker.BadRequestError, tinker.RequestFailedError), match=says) as raised:
        sampler.sample(prompt(tokens), 1, given).result(SECONDS)
    if isinstance(raised.value, tinker.RequestFailedError):
        assert raised.value.category == "user"
    assert math.isfinite(np.sum(scores(sampler)))
