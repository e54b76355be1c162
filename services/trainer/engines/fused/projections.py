"""The linear layers of a decoder layer, joined where they read the same input.

Queries, keys and values are one product instead of three, gate and up one instead of two. The joined weights take the
place of the model's own, which become views of them, so nothing is held twice. Behind each weight's columns there is
room for the B of adapters, so that a product with both is one product (see `layer.project`).
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
    """One kind in one layer, `out` over all parts; bias [out] or None."""

    wide: Tensor
    """[out, in + room]: the weight, and zeros."""
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


def join(model: PreTrainedModel, ranks: int) -> list[list[Projection]]:
    """Return the projections of every layer, in the order of `KINDS`, with room for adapters of so many ranks."""
    return [[_joined(layer, kind, ranks * len(kind.parts)) for kind in KINDS] for layer in model.base_model.layers]


def _linears(layer: nn.Module, kind: Kind) -> list[nn.Linear]:
    module = layer.get_submodule(kind.module)
    return [module.get_submodule(part) for part in kind.parts]  # type: ignore[misc]


def _shape(layer: nn.Module, kind: Kind) -> KindShape:
    linears = _linears(layer, kind)
    return KindShape(kind, linears[0].in_features, tuple(linear.out_features for linear in linears))


def _joined(layer: nn.Module, kind: Kind, room: int) -> Projection:
    linears = _linears(layer, kind)
    outputs, inputs = [linear.out_features for linear in linears], linears[0].in_features
    wide = linears[0].weight.new_zeros(sum(outputs), inputs + room)
    for linear, rows in zip(linears, torch.split(wide[:, :inputs], outputs), strict=True):
        rows.copy_(linear.weight.detach())
        linear.weight.data = rows
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return Projection(wide, torch.cat(biases) if biases else None)
