"""Both engines on a GPU in bfloat16: they learn, they agree with each other, and runs share a pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.sampler.engines.torch_engine import TorchSamplerEngine
from services.trainer.engines.base import PassItem
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec, PolicyRef
from shared.contracts.sampling import SampleRequest, SamplingParams
from shared.contracts.training import AdamParams, Datum, LossSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LOSS = LossSpec(name="cross_entropy")


def datum(tokens: list[int]) -> Datum:
    return Datum(tokens=Int32s(tokens[:-1]), targets=Int32s(tokens[1:]))


@pytest.fixture
def trainer(tiny_model: Path) -> TorchTrainerEngine:
    return TorchTrainerEngine("tiny", tiny_model, device="cuda")


def test_a_run_learns(trainer: TorchTrainerEngine) -> None:
    trainer.create_run("a", LoraSpec(rank=8, train_unembed=True))
    losses = []
    for _ in range(30):
        (outcome,) = trainer.forward_backward([PassItem("a", [datum([5, 6, 7, 8, 9])], LOSS)])
        assert outcome.error is None
        losses.append(outcome.metrics["loss:sum"])
        trainer.optim_step({"a": AdamParams(learning_rate=0.02)})
    assert losses[-1] < 0.5 * losses[0]


def test_runs_in_one_pass_get_what_they_get_alone(trainer: TorchTrainerEngine) -> None:
    data = {"a": [5, 6, 7, 8, 9], "b": [9, 8, 7], "c": [4, 4, 4, 4]}
    for number, run in enumerate(data):
        trainer.create_run(run, LoraSpec(rank=4 * (number + 1), seed=number))
        trainer.forward_backward([PassItem(run, [datum(data[run])], LOSS)])
        trainer.optim_step({run: AdamParams(learning_rate=0.05)})
    alone = [trainer.forward_backward([PassItem(run, [datum(data[run])], LOSS, forward_only=True)])[0] for run in data]
    together = trainer.forward_backward([PassItem(run, [datum(data[run])], LOSS, forward_only=True) for run in data])
    for one, other in zip(alone, together, strict=True):
        assert one.metrics["loss:sum"] == pytest.approx(other.metrics["loss:sum"], rel=0.02)


def test_a_parked_run_leaves_the_gpu_and_goes_on_bit_for_bit(trainer: TorchTrainerEngine) -> None:
    trainer.create_run("a", LoraSpec(rank=64))
    trainer.forward_backward([PassItem("a", [datum([5, 6, 7, 8, 9])], LOSS)])
    before, used = trainer.snapshot("a"), torch.cuda.memory_allocated()
    trainer.park("a")
    assert torch.cuda.memory_allocated() <= used - trainer.size_of("a")
    assert trainer._states["a"].weights.is_pinned()
    assert trainer.snapshot("a") == before
    trainer.bring_back("a")
    assert trainer._states["a"].weights.is_cuda
    assert trainer.snapshot("a") == before
    assert not trainer.optim_step({"a": AdamParams()})["a"].error


async def test_logprobs_of_trainer_and_sampler_agree(trainer: TorchTrainerEngine, tiny_model: Path) -> None:
    trainer.create_run("a", LoraSpec(rank=8))
    for _ in range(5):
        trainer.forward_backward([PassItem("a", [datum([5, 6, 7, 8, 9])], LOSS)])
        trainer.optim_step({"a": AdamParams(learning_rate=0.02)})
    policy = PolicyRef(run="a", version=1)
    sampler = TorchSamplerEngine("tiny", str(tiny_model), device="cuda")
    await sampler.start()
    await sampler.load_policy(policy, trainer.export_adapter("a"))
    request = SampleRequest(
        request_id="r",
        base_model="tiny",
        prompt=Int32s([5, 6, 7]),
        params=SamplingParams(max_tokens=32, seed=1, stop=[]),
        num_samples=16,
        policy=policy,
    )
    result = await sampler.generate(request)
    data = [datum([5, 6, 7, *sequence.tokens]) for sequence in result.sequences]
    (outcome,) = trainer.forward_backward([PassItem("a", data, LOSS, forward_only=True)])
    assert outcome.error is None
    gaps = [
        abs(ours - theirs)
        for logprobs, sequence in zip(outcome.logprobs, result.sequences, strict=True)
        for ours, theirs in zip(list(logprobs)[2:], sequence.logprobs, strict=True)
    ]
    assert len(gaps) == 16 * 32
    assert sum(gaps) / len(gaps) <= 0.02
    await sampler.stop()
