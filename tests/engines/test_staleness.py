"""What old samples do to training: `stable_reinforce` stays on its feet where `importance_sampling` falls.

The task is to write tokens whose ids are multiples of eight. Rewards are noisy, as those of judges are, so that
advantages never vanish, and every batch comes from the weights of eight optimizer steps ago. Seeds, samples' noise,
learning rate and everything else are the same for all; only the loss differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor

from services.trainer.engines.base import PassItem
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossName, LossSpec
from shared.models.loading import load_base
from shared.models.lora import Adapter, AdapterBank
from tests.engines.tiny import VOCABULARY, make_tiny_model
from tests.engines.training import good

STALENESS = 8
UPDATES = 70
WINDOW = 10
"""Updates over which rewards are averaged."""
PROMPTS, GROUP, LENGTH = 4, 8, 12
NOISE = 0.2
ADAM = AdamParams(learning_rate=0.03, eps=1e-8)


@dataclass
class Learner:
    """One run, the policies that it had, and how it went."""

    loss: LossName
    staleness: int
    seed: int
    policies: deque[Adapter] = field(default_factory=deque)
    """The newest last; the first one samples."""
    rewards: list[float] = field(default_factory=list)
    """Of each batch, without the noise."""
    apart: list[float] = field(default_factory=list)
    """Of each batch the estimated divergence between the weights and what sampled it, in nats for a token."""

    @property
    def run(self) -> str:
        return f"{self.loss}-{self.staleness}-{self.seed}"

    def publish(self, adapter: Adapter) -> None:
        weights = {path: (a.detach().clone(), b.detach().clone()) for path, (a, b) in adapter.weights.items()}
        self.policies.append(Adapter(adapter.spec, weights))
        if len(self.policies) > self.staleness + 1:
            self.policies.popleft()

    @property
    def levels(self) -> list[float]:
        """Mean reward of each window."""
        return [sum(self.rewards[at : at + WINDOW]) / WINDOW for at in range(0, UPDATES, WINDOW)]

    @property
    def fall(self) -> float:
        """The most that was lost of a level once reached."""
        levels = self.levels
        return max(max(levels[: at + 1]) - level for at, level in enumerate(levels))


class Sampler:
    """The base model with one adapter for each learner's oldest policy."""

    def __init__(self, model: Path) -> None:
        self.model = load_base(model)
        self.bank = AdapterBank(self.model)

    @torch.no_grad()
    def sample(self, learners: Sequence[Learner], update: int) -> tuple[Tensor, Tensor]:
        """Return ids [learners, samples, tokens] and log-probabilities [learners, samples, LENGTH]."""
        for learner in learners:
            self.bank.add(learner.run, learner.policies[0])
        prompts = torch.arange(PROMPTS).repeat_interleave(GROUP)[:, None] * 7 + torch.arange(2)
        ids, logprobs = prompts.repeat(len(learners), 1), []
        chances = torch.stack([_uniform(learner.seed, update) for learner in learners]).flatten(0, 1)
        cache = None
        for at in range(LENGTH):
            new = ids if cache is None else ids[:, -1:]
            rows = PROMPTS * GROUP * new.shape[1]
            with self.bank.use([(learner.run, i * rows, (i + 1) * rows) for i, learner in enumerate(learners)]):
                output = self.model(new, past_key_values=cache, use_cache=True)
            lp, cache = output.logits[:, -1].log_softmax(-1), output.past_key_values
            chosen = (lp - chances[:, at].log().neg().log()).argmax(-1, keepdim=True)  # Gumbel's trick
            logprobs.append(lp.gather(1, chosen))
            ids = torch.cat([ids, chosen], dim=1)
        return ids.view(len(learners), -1, ids.shape[1]), torch.cat(logprobs, dim=1).view(len(learners), -1, LENGTH)


def _uniform(seed: int, update: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + update)
    return torch.rand(PROMPTS * GROUP, LENGTH, VOCABULARY, generator=generator).clamp(1e-7, 1 - 1e-7)


def rewarded(ids: Tensor) -> Tensor:
    """Return the share of completion tokens that are multiples of eight, [samples]."""
    return (ids[:, -LENGTH:] % 8 == 0).float().mean(dim=1)


def batch_of(ids: Tensor, logprobs: Tensor, rewards: Tensor) -> list[Datum]:
    """Return the data of a step, with advantages relative to the group over its deviation."""
    groups = rewards.view(PROMPTS, GROUP)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten().tolist()
    data = []
    for row, lp, advantage in zip(ids.tolist(), logprobs.tolist(), advantages, strict=True):
        padding = [0.0] * (len(row) - 1 - LENGTH)
        data.append(
            Datum(
                tokens=Int32s(row[:-1]),
                targets=Int32s(row[1:]),
                weights=Float32s([*padding, *[1.0] * LENGTH]),
                logprobs=Float32s([*padding, *lp]),
                advantages=Float32s([*padding, *[advantage] * LENGTH]),
            )
        )
    return data


def learn(model: Path, learners: Sequence[Learner]) -> None:
    """Train all of them, in one pass for each update."""
    engine, sampler = TorchTrainerEngine("tiny", model), Sampler(model)
    for learner in learners:
        engine.create_run(learner.run, LoraSpec(rank=8, seed=learner.seed, train_unembed=True))
        learner.publish(engine._states[learner.run].adapter)
    for update in range(UPDATES):
        items = []
        for learner, ids, logprobs in zip(learners, *sampler.sample(learners, update), strict=True):
            rewards = rewarded(ids)
            learner.rewards.append(rewards.mean().item())
            noise = torch.randn(len(rewards), generator=torch.Generator().manual_seed(7777 * learner.seed + update))
            items.append(
                PassItem(learner.run, batch_of(ids, logprobs, rewards + NOISE * noise), LossSpec(name=learner.loss))
            )
        for learner, outcome in zip(learners, engine.forward_backward(items), strict=True):
            learner.apart.append(good(outcome).metrics["kl:mean"])
        engine.optim_step({learner.run: ADAM for learner in learners})
        for learner in learners:
            learner.publish(engine._states[learner.run].adapter)


@pytest.fixture(scope="module")
def learners(tmp_path_factory: pytest.TempPathFactory) -> list[Learner]:
    every = [
        *(Learner("stable_reinforce", STALENESS, seed) for seed in range(8)),
        *(Learner("importance_sampling", STALENESS, seed) for seed in range(12)),
        *(Learner("importance_sampling", 0, seed) for seed in range(2)),
    ]
    learn(make_tiny_model(tmp_path_factory.mktemp("llama")), every)
    return every


def of(learners: Sequence[Learner], loss: str, staleness: int) -> list[Learner]:
    return [learner for learner in learners if (learner.loss, learner.staleness) == (loss, staleness)]


def lost(learner: Learner) -> bool:
    """Whether it ended far below where it began: an untrained model has the level 0.13."""
    return learner.levels[-1] < 0.05


# In 16 seeds the last levels were 0.13 to 0.91, with falls of up to 0.17 on the way.
def test_stable_reinforce_learns_from_samples_eight_steps_old_and_keeps_what_it_has(learners: list[Learner]) -> None:
    stable = of(learners, "stable_reinforce", STALENESS)
    assert not [learner.seed for learner in stable if lost(learner) or learner.fall > 0.3]
    assert fmean(learner.levels[-1] for learner in stable) > 0.3


# Rounding decides which: of 16 seeds six ended below 0.02, in other orders of the runs up to five of six.
def test_importance_sampling_is_lost_on_some_seeds(learners: list[Learner]) -> None:
    assert any(map(lost, of(learners, "importance_sampling", STALENESS)))


# On average 3.5 nats for a token, at most 5.1, against 19 to 37 and at least 12.
def test_stable_reinforce_stays_near_the_policy_that_sampled(learners: list[Learner]) -> None:
    stable, plain = (of(learners, loss, STALENESS) for loss in ("stable_reinforce", "importance_sampling"))
    assert max(max(learner.apart) for learner in stable) < 10
    assert fmean(max(learner.apart) for learner in plain) > 2 * fmean(max(learner.apart) for learner in stable)


def test_with_fresh_samples_importance_sampling_learns_at_this_learning_rate(learners: list[Learner]) -> None:
    """So that it is the age of the samples that it does not survive."""
    for learner in of(learners, "importance_sampling", 0):
        assert learner.levels[-1] > 0.9
