"""Training data, and what the same model computes in plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load
from tinker import SamplingClient, TrainingClient, types
from transformers import AutoModelForCausalLM

TOKENS = [5, 6, 7, 8, 9, 10]
OTHERS = [40, 30, 20, 10, 60, 70]
NEW = [0.3, -0.2, 1.0, 0.0, -1.5]
"""Advantages of the targets in `TOKENS`."""
CLOSE = 2e-4
"""Between two ways to compute the same in fp32."""


class Reference:
    """A model in plain transformers, with an adapter in PEFT's format if there is one."""

    def __init__(self, directory: Path, adapter: Path | None = None) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        if adapter is not None:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, str(adapter)).eval()

    def table(self, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of all tokens behind each prefix: [N, V]."""
        with torch.no_grad():
            return torch.log_softmax(self._model(torch.tensor([list(tokens)])).logits[0].double(), -1)

    def scores(self, tokens: Sequence[int]) -> list[float]:
        """Log-probability of each token but the first."""
        table = self.table(tokens)
        return [table[place, token].item() for place, token in enumerate(tokens[1:])]


def prompt(tokens: Sequence[int] = TOKENS) -> types.ModelInput:
    return types.ModelInput.from_ints(list(tokens))


def datum(tokens: Sequence[int] = TOKENS, weights: Sequence[float] | None = None, **more: Any) -> types.Datum:
    """Each token predicts the next one."""
    inputs: dict[str, Any] = {"target_tokens": list(tokens[1:]), **more}
    if not more:
        inputs["weights"] = list(weights or [1.0] * (len(tokens) - 1))
    return types.Datum(model_input=prompt(tokens[:-1]), loss_fn_inputs=inputs)


def loss(training: TrainingClient, tokens: Sequence[int] = TOKENS) -> float:
    """Of a whole sequence."""
    return training.forward([datum(tokens)], "cross_entropy").result().metrics["loss:sum"]


def learn(
    training: TrainingClient,
    steps: int = 3,
    tokens: Sequence[int] = TOKENS,
    rate: float = 0.02,
    eps: float = 1e-12,
) -> list[float]:
    """Losses of several steps, all sent before the first result is waited for."""
    passes = []
    for _ in range(steps):
        passes.append(training.forward_backward([datum(tokens)], "cross_entropy"))
        training.optim_step(types.AdamParams(learning_rate=rate, eps=eps))
    return [each.result().metrics["loss:sum"] for each in passes]


def scores(sampler: SamplingClient, tokens: Sequence[int] = TOKENS) -> list[float]:
    """Log-probability of each token but the first."""
    first, *found = sampler.compute_logprobs(prompt(tokens)).result()
    assert first is None
    return [each for each in found if each is not None]


def fetched(urls: dict[str, str]) -> dict[str, bytes]:
    """Files behind links, without a key."""
    return {name: httpx.get(url, timeout=60).raise_for_status().content for name, url in urls.items()}


def tensors(content: bytes) -> dict[str, torch.Tensor]:
    """Those of an adapter's file."""
    return load(content)
