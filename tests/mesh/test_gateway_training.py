"""The real client trains, saves and samples the tiny model through a gateway."""

from __future__ import annotations

import asyncio

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
