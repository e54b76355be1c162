"""The same training done plainly: one run, one sequence at a time, PEFT and `torch.optim.AdamW`, `formulas` as losses.

Nothing here shares code with the engine beyond the files that it exports and the loading of the base model.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.training import AdamParams, Datum, LossSpec
from shared.models.loading import load_base
from tests.engines.formulas import loss_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peft's imports, in whatever versions are installed together
    import peft


def write(files: dict[str, bytes], directory: Path) -> Path:
    """Write files by name into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def load_peft(model: Path, adapter: Path, *, trainable: bool = False) -> nn.Module:
    """Return the base model with an adapter on it, as anyone who uses PEFT would load it."""
    with warnings.catch_warnings():
        # 0.21 asks transformers under a name deprecated there, and warns of a merge that is not done here.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*")
        loaded: nn.Module = peft.PeftModel.from_pretrained(load_base(model), adapter, is_trainable=trainable)
    return loaded


@dataclass
class Alone:
    """One run by itself."""

    model: nn.Module
    optimizer: torch.optim.AdamW

    @classmethod
    def load(cls, model: Path, adapter: Path) -> Alone:
        """Begin with an adapter's files."""
        loaded = load_peft(model, adapter, trainable=True)
        loaded.eval()
        return cls(loaded, torch.optim.AdamW(p for p in loaded.parameters() if p.requires_grad))

    def logprobs(self, datum: Datum) -> Tensor:
        """Return log-probabilities of the targets, [N * K]."""
        logits = self.model(input_ids=torch.tensor([list(datum.tokens)])).logits[0]
        targets = torch.tensor(datum.targets).view(len(datum.tokens), datum.targets_per_token).long()
        picked: Tensor = logits.log_softmax(-1).gather(1, targets).flatten()
        return picked

    def forward_backward(self, data: Sequence[Datum], loss: LossSpec) -> list[Tensor]:
        """Add to the gradients; return the log-probabilities."""
        kept = []
        for datum in data:
            lp = self.logprobs(datum)
            loss_of(lp, datum, loss).backward()  # type: ignore[no-untyped-call]
            kept.append(lp.detach())
        return kept

    def step(self, adam: AdamParams) -> float:
        """Clip and apply; return the norm before clipping."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, adam.grad_clip_norm or float("inf")))
        for group in self.optimizer.param_groups:
            group.update(lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps)
            group.update(weight_decay=adam.weight_decay)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def named(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """Return weights or gradients under the names that they have in PEFT's file."""
        named = {n.replace(".default", ""): p for n, p in self.model.named_parameters() if p.requires_grad}
        if not gradients:
            return {name: weight.data for name, weight in named.items()}
        return {name: weight.grad for name, weight in named.items() if weight.grad is not None}


def exported(files: dict[str, bytes]) -> dict[str, Tensor]:
    """Return the tensors in an adapter's file."""
    tensors: dict[str, Tensor] = safetensors.torch.load(files["adapter_model.safetensors"])
    return tensors


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the L2 distance of two sets of tensors relative to the norm of the second. The names must agree."""
    assert ours.keys() == theirs.keys()
    one, other = (
        torch.cat([tensors[name].flatten().double() for name in sorted(tensors)]) for tensors in (ours, theirs)
    )
    return float((one - other).norm() / other.norm())


def some_data(seed: int, loss: str, *, count: int = 4, group: int = 1, **settings: Any) -> list[Datum]:
    """Return `count` random sequences; each `group` neighbours begin with the same prompt.

    `shortest` and `longest` bound prompts; `completion` is the length of what follows, by default as long again;
    `width` is the number of targets of a token.
    """
    draw = random.Random(seed)
    data: list[Datum] = []
    for index in range(count):
        length = draw.randrange(settings.get("shortest", 4), settings.get("longest", 24))
        if index % group == 0:
            prompt = [draw.randrange(256) for _ in range(length)]
        completion = [draw.randrange(256) for _ in range(settings.get("completion", length))]
        data.append(_datum(draw, [*prompt, *completion], len(prompt), loss, settings.get("width", 1)))
    return data


def _datum(draw: random.Random, ids: list[int], prompt: int, loss: str, width: int) -> Datum:
    n = len(ids) - 1
    mask = [0.0] * (prompt - 1) + [1.0] * (n - prompt + 1)
    if loss == "cross_entropy":
        weights = [draw.uniform(-0.5, 2.0) * keep for keep in mask for _ in range(width)]
        targets = ids[1:] if width == 1 else [draw.randrange(256) for _ in weights]
        return Datum(
            tokens=Int32s(ids[:-1]), targets=Int32s(targets), weights=Float32s(weights), targets_per_token=width
        )
    advantage = draw.choice([-1.5, 0.5, 1.0])
    # Below the log-probabilities of a random model by more and less, so that ratios are clipped on both sides; nearer
    # to each other for `gspo`, whose mean would else always be clipped.
    spread = (-5.8, -5.3) if loss == "gspo" else (-7.5, -4.0)
    return Datum(
        tokens=Int32s(ids[:-1]),
        targets=Int32s(ids[1:]),
        weights=Float32s(mask),
        logprobs=Float32s(draw.uniform(*spread) for _ in range(n)),
        advantages=Float32s([advantage] * n),
        ratio_mask=Float32s([0.0] * prompt + [1.0] * (n - prompt)) if loss == "gspo" and draw.random() < 0.5 else None,
    )
