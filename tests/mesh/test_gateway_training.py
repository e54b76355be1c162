"""The real client trains, saves and samples the tiny model through a gateway."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import pytest
import tinker
from tinker import types

from shared.bus import Bus
from tests.mesh.gateways import add_key, sdk
from tests.mesh.harness import MODEL, Place

TOKENS = [5, 6, 7, 8, 9]


def datum(tokens: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},  # type: ignore[dict-item]
    )


def learn(training: tinker.TrainingClient, steps: int, tokens: list[int]) -> list[float]:
    """Losses of several steps, all sent before the first result is waited for."""
    futures = []
    for _ in range(steps):
        futures.append(training.forward_backward([datum(tokens)], "cross_entropy"))
        training.optim_step(types.AdamParams(learning_rate=0.02))
    return [future.result().metrics["loss:sum"] for future in futures]


async def test_a_run_learns_and_what_it_has_learned_is_sampled(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.trainer(), place.sampler(), place.gateway() as gateway, sdk(gateway.port) as service:

        def script() -> None:
            training = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1).result()
            losses = learn(training, 20, TOKENS)
            assert losses[-1] < losses[0] / 2
            sampler = training.save_weights_and_get_sampling_client().result()
            params = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
            result = sampler.sample(types.ModelInput.from_ints(TOKENS[:2]), 1, params).result()
            assert result.sequences[0].tokens == TOKENS[2:]
            assert result.sequences[0].stop_reason == "length"
            info = training.get_info()
            assert (info.model_data.model_name, info.lora_rank) == (MODEL, 8)
            assert training.get_tokenizer().encode("A") == [65]

        await asyncio.to_thread(script)


async def test_what_was_saved_is_sampled_and_trained_on_as_it_was(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.trainer(), place.sampler(), place.gateway() as gateway, sdk(gateway.port) as service:

        def script() -> None:
            training = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1).result()
            learn(training, 20, TOKENS)
            path = training.save_weights_for_sampler("first", ttl_seconds=3600).result().path
            assert path == f"tinker://{training.model_id}/sampler_weights/first"
            by_path = service.create_sampling_client(model_path=path, base_model=MODEL).result()
            snapshot = training.save_weights_and_get_sampling_client().result()
            state = training.save_state("middle", user_metadata={"why": "test"}).result().path
            before = [scores(sampler) for sampler in (by_path, snapshot)]
            assert before[0] == pytest.approx(before[1], abs=1e-4)
            learn(training, 10, [5, 6, 4, 3, 2])
            assert [scores(sampler) for sampler in (by_path, snapshot)] == before, "old clients keep old weights"
            newest = training.save_weights_and_get_sampling_client().result()
            assert scores(newest) != pytest.approx(before[0], abs=1e-2)
            again = service.create_training_client_from_state_with_optimizer(state).result()
            assert again.model_id != training.model_id
            loss = again.forward([datum(TOKENS)], "cross_entropy").result().metrics["loss:sum"]
            assert -sum(before[0][1:]) == pytest.approx(loss, abs=1e-3)

        await asyncio.to_thread(script)


async def test_a_client_may_wait_for_all_its_samples_with_one_poll(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.sampler(), place.gateway(poll_for_many=True) as gateway, sdk(gateway.port) as service:

        def script() -> None:
            sampler = service.create_sampling_client(base_model=MODEL).result()
            prompt, params = types.ModelInput.from_ints(TOKENS), types.SamplingParams(max_tokens=2, stop=[])
            results = [future.result() for future in [sampler.sample(prompt, 1, params) for _ in range(20)]]
            assert len({result.sequences[0].sequence_id for result in results}) == 20

        await asyncio.to_thread(script)


async def test_samplers_in_flight_follow_their_run(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.trainer(), place.sampler(), place.gateway() as gateway, sdk(gateway.port) as service:

        def script() -> None:
            training = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1).result()
            sampler = training.save_weights_and_get_sampling_client(kind="inflight").result()
            first = scores(sampler)
            learn(training, 5, TOKENS)
            newer = training.save_weights_and_get_sampling_client(kind="inflight").result()
            learned = scores(newer)
            assert learned != pytest.approx(first, abs=1e-2)
            give_up = time.monotonic() + 30
            while scores(sampler) != pytest.approx(learned, abs=1e-4):
                assert time.monotonic() < give_up, "the older client adopts what was published later"

        await asyncio.to_thread(script)


async def test_losses_of_ones_own_and_those_by_provenance(place: Place, bus: Bus) -> None:
    await add_key(bus)
    async with place.trainer(), place.sampler(), place.gateway() as gateway, sdk(gateway.port) as service:

        def script() -> None:
            training = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1).result()
            plain = training.forward([datum(TOKENS)], "cross_entropy").result()

            def twice(_: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
                return -2 * logprobs[0].sum(), {"mine": 1.0}

            own = training.forward_backward_custom([datum(TOKENS)], twice).result()
            assert own.metrics["loss:sum"] == pytest.approx(2 * plain.metrics["loss:sum"], rel=1e-5)
            assert own.metrics["mine"] == 1.0
            sampler = training.save_weights_and_get_sampling_client(record_stability_info=True).result()
            prompt = types.ModelInput.from_ints(TOKENS[:2])
            drawn = sampler.sample(prompt, 2, types.SamplingParams(max_tokens=4, stop=[])).result()
            result = training.forward_backward([recorded(one) for one in drawn.sequences], "stable_reinforce").result()
            for output, one in zip(result.loss_fn_outputs, drawn.sequences, strict=True):
                assert output["logprobs"].data[1:] == pytest.approx(one.logprobs, abs=1e-4)
            wrong = dataclasses.replace(drawn.sequences[0], sequence_id="s-1.sample-0.0/0")
            with pytest.raises(tinker.RequestFailedError, match="is not known in this session"):
                training.forward_backward([recorded(wrong)], "stable_reinforce").result()
            optimized = training.optim_step(types.AdamParams()).result()
            assert optimized.metrics is not None, "a refused operation holds up nothing"

        await asyncio.to_thread(script)


def scores(sampler: tinker.SamplingClient) -> list[float]:
    """Log-probabilities of `TOKENS`; 0 for the first, which has none."""
    found = sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()
    assert found[0] is None
    return [0.0, *(score for score in found if score is not None)]


def recorded(sequence: types.SampledSequence) -> types.Datum:
    """Training data of a sample after the first two of `TOKENS`, with where they come from."""
    tokens, length = [*TOKENS[:2], *sequence.tokens], len(sequence.tokens)
    mask = types.TensorData(data=[0.0, *[1.0] * length], dtype="float32", shape=[length + 1])
    inputs: Any = {"target_tokens": tokens[1:], "advantages": mask, "mask": mask}
    name = sequence.sequence_id
    prompt = types.PromptProvenanceSpan(sequence_id=name, length=2)
    last_of_prompt = types.PromptProvenanceSpan(sequence_id=name, offset=1, length=1)
    all_but_last = types.SampledProvenanceSpan(sequence_id=name, length=length - 1)
    drawn = types.SampledProvenanceSpan(sequence_id=name, length=length)
    found = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    return found.with_provenance(model_input=[prompt, all_but_last], loss_fn_inputs=[last_of_prompt, drawn])
