"""The linear layers of a decoder layer, joined where they read the same input.

Queries, keys and values are one product instead of three, gate and up one instead of two. The joined weights take the
place of the model's own, which become views of them, so nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Kind:
    """One joined product of a layer."""

    module: str
    """The child of the decoder layer that holds its parts."""
    parts: tuple[str, ...]


QKV = Kind("self_attn", ("q_proj", "k_proj", "v_proj"))
OUT = Kind("self_attn", ("o_proj",))
GATE_UP = Kind("mlp", ("gate_proj", "up_proj"))
DOWN = Kind("mlp", ("down_proj",))
KINDS = (QKV, OUT, GATE_UP, DOWN)


@dataclass(frozen=True)
class Projection:
    """One kind in one layer: weight [out, in], bias [out] or None, `out` over all parts."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class KindShape:
    """What all layers have in common of one kind."""

    kind: Kind
    inputs: int
    outputs: tuple[int, ...]
    """Of each part."""

    @property
    def starts(self) -> list[int]:
        """First output of each part."""
        return [sum(self.outputs[:part]) for part in range(len(self.outputs))]


def kind_shapes(layers: Sequence[nn.Module]) -> list[KindShape]:
    """Return the shapes of every kind. Raise `ValueError` if the layers differ: then they cannot be stacked."""
    found = [[_shape(layer, kind) for kind in KINDS] for layer in layers]
    if any(shapes != found[0] for shapes in found):
        raise ValueError("the layers of the model have different shapes")
    return found[0]


def join(model: PreTrainedModel) -> list[list[Projection]]:
    """Return the projections of every layer, in the order of `KINDS`."""
    return [[_joined(layer, kind) for kind in KINDS] for layer in model.base_model.layers]


def _linears(layer: nn.Module, kind: Kind) -> list[nn.Linear]:
    module = layer.get_submodule(kind.module)
    return [module.get_submodule(part) for part in kind.parts]  # type: ignore[misc]


def _shape(layer: nn.Module, kind: Kind) -> KindShape:
    linears = _linears(layer, kind)
    return KindShape(kind, linears[0].in_features, tuple(linear.out_features for linear in linears))


def _joined(layer: nn.Module, kind: Kind) -> Projection:
    linears = _linears(layer, kind)
    if len(linears) == 1:
        return Projection(linears[0].weight.detach(), _detached(linears[0].bias))
    weight = torch.cat([linear.weight.detach() for linear in linears])
    for linear, rows in zip(linears, torch.split(weight, [linear.out_features for linear in linears]), strict=True):
        linear.weight.data = rows
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return Projection(weight, torch.cat([bias.detach() for bias in biases]) if biases else None)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
