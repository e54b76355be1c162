"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) of many runs over one frozen model, in one pass.

A linear layer W with an adapter computes W x + alpha / rank * B A x. `AdapterBank` puts an `AdapterLinear` in the
place of every layer that can be adapted; which rows of a batch go through which adapter is said from outside, with
`bank.use`. Rows without an adapter see the base model only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.contracts.policies import LoraSpec
from shared.errors import UserError
from shared.models.low_rank import Part, adapted_linear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNEMBED = ("lm_head",)

Segment = tuple[Hashable | None, int, int]
"""Rows `start` to `stop` of the flattened input belong to the adapter under this key; None: to the base model."""


def target_names(spec: LoraSpec) -> tuple[str, ...]:
    """Return the last names of the layers that `spec` adapts."""
    return ATTENTION * spec.train_attn + MLP * spec.train_mlp + UNEMBED * spec.train_unembed


def linear_layers(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers of `model` whose path ends in one of `names`, by path, in the order of the model."""
    found = model.named_modules()
    return {path: layer for path, layer in found if path.rpartition(".")[2] in names and isinstance(layer, nn.Linear)}


@dataclass(frozen=True)
class Adapter:
    """A run's low-rank weights: for each module path A [rank, in] and B [out, rank], fp32 on the model's device."""

    spec: LoraSpec
    weights: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def fresh(cls, model: nn.Module, spec: LoraSpec) -> Adapter:
        """Begin with A uniform in ±1/sqrt(in), PEFT's default, and B zero: the adapted model equals the base.

        A depends on `spec.seed` and the shapes only, never on torch's global generator. Raise `UserError` if `spec`
        trains no layer of the model.
        """
        layers = linear_layers(model, target_names(spec))
        if not layers:
            raise UserError("the adapter trains nothing: set train_attn, train_mlp or train_unembed")
        generator = torch.Generator().manual_seed(spec.seed or 0)
        return cls(spec, {path: _fresh_pair(layer, spec.rank, generator) for path, layer in layers.items()})

    @property
    def scale(self) -> float:
        """The factor alpha / rank before B A."""
        return self.spec.alpha / self.spec.rank

    @cached_property
    def places(self) -> list[tuple[str, int]]:
        """Path of the module, and 0 for A or 1 for B, of each tensor: all layers of one matrix are neighbours."""
        by_name: dict[str, list[str]] = {}
        for path in self.weights:
            by_name.setdefault(path.rpartition(".")[2], []).append(path)
        return [(path, which) for paths in by_name.values() for which in (0, 1) for path in paths]

    def tensors(self) -> Iterator[Tensor]:
        """Yield A and B of every module, in the order of `places`."""
        for path, which in self.places:
            yield self.weights[path][which]

    @property
    def trainable(self) -> bool:
        """Whether its weights require a gradient, as a trainer's do and a sampler's do not."""
        return any(tensor.requires_grad for tensor in self.tensors())

    def cast(self, dtype: torch.dtype) -> Adapter:
        """Return it with weights of another dtype."""
        return Adapter(self.spec, {path: (a.to(dtype), b.to(dtype)) for path, (a, b) in self.weights.items()})


def _fresh_pair(layer: nn.Linear, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    bound = 1 / math.sqrt(layer.in_features)
    a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
    return a.to(layer.weight.device), torch.zeros(layer.out_features, rank, device=layer.weight.device)


@dataclass
class _Active:
    """What the layers of one model share: the adapters present and the rows now in use."""

    adapters: dict[Hashable, Adapter] = field(default_factory=dict)
    segments: list[tuple[Adapter, int, int]] = field(default_factory=list)


class AdapterLinear(nn.Linear):
    """A frozen linear layer that adds the low-rank products of the adapters in use.

    It shares weight and bias with the layer that it replaces, under the same names, so tied weights stay tied and the
    model's state dict is unchanged.
    """

    def __init__(self, base: nn.Linear, path: str, active: _Active) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.path, self.active = path, active

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear names it
        """Map [..., in] to [..., out]."""
        parts = [
            Part(*pair, adapter.scale, start, stop)
            for adapter, start, stop in self.active.segments
            if (pair := adapter.weights.get(self.path)) is not None
        ]
        if not parts:
            return functional.linear(input, self.weight, self.bias)
        return adapted_linear(input, self.weight, self.bias, parts)


class AdapterBank:
    """The adapters of one model. Made again for the same model, it is the same bank."""

    def __init__(self, model: nn.Module) -> None:
        layers = linear_layers(model, ATTENTION + MLP + UNEMBED)
        wrapped = [layer for layer in layers.values() if isinstance(layer, AdapterLinear)]
        self._active = wrapped[0].active if wrapped else _Active()
        self._dtype = next(iter(layers.values())).weight.dtype
        for path, layer in layers.items():
            if not isinstance(layer, AdapterLinear):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, AdapterLinear(layer, path, self._active))

    @property
    def keys(self) -> frozenset[Hashable]:
        """The keys that are present."""
        return frozenset(self._active.adapters)

    def add(self, key: Hashable, adapter: Adapter) -> None:
        """Put an adapter under `key`, in the place of an earlier one.

        A trainable adapter stays as it is and is cast at every use, so that gradients reach its fp32 weights; any
        other is cast to the model's dtype once, here.
        """
        self._active.adapters[key] = adapter if adapter.trainable else adapter.cast(self._dtype)

    def remove(self, key: Hashable) -> None:
        """Forget an adapter; an unknown key is ignored."""
        self._active.adapters.pop(key, None)

    @contextmanager
    def use(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Send rows of the flattened [rows, hidden] input of every layer through their adapters.

        Segments must not overlap; rows in none of them see the base model. Raise `KeyError` for an unknown key. Uses
        may nest: the inner one counts.
        """
        adapters = self._active.adapters
        chosen = [(adapters[key], start, stop) for key, start, stop in segments if key is not None and stop > start]
        before, self._active.segments = self._active.segments, chosen
        try:
            yield
        finally:
            self._active.segments = before
