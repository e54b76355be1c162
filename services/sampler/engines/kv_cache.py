"""Keys and values of the sequences being generated: one row each, the rows in use always the first ones.

A model writes into it through transformers' `Cache` interface. What a forward pass does with the cache is said by its
step: a prefill puts whole prompts into new rows, a decode adds one position to every row. Attention then reads the
rows in place, without gathering or copying them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from services.sampler.engines.batching import Room, Shape, grown


@dataclass
class PrefillStep:
    """Prompts [b, T], filled up on the right, go into the rows from `start` on."""

    start: int
    source: Tensor
    """[m]: the prompt that each new row begins with."""
    masks: dict[int, Tensor] = field(default_factory=dict)
    """By sliding window, [T, T], true where a token sees another; made once, used by all layers."""


@dataclass
class DecodeStep:
    """One token for each of n rows. The batch may have another order than the rows: grouped by policy."""

    rows: Tensor
    """[n]: the row of each token of the batch."""
    positions: Tensor
    """[n]: the position of each token of the batch in its row."""
    row_positions: Tensor
    """[n]: the same in the order of the rows."""
    length: int
    """Positions that attention reads; what is behind a row's own position is masked."""
    batch_of_row: Tensor | None = None
    """[n]: where in the batch each row is. None: both have the same order, and `rows` is 0, 1, 2, …"""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """By sliding window (None: no window), [n, 1, 1, length], 0 or -inf; made once, used by all layers."""


class RowCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """For each layer keys and values [rows, heads, positions, size], of which the first rows are in use."""

    def __init__(self, room: Room) -> None:
        super().__init__(layers=[])
        self.room = room
        self.shape = Shape()
        self.step: PrefillStep | DecodeStep | None = None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def position_bytes(self) -> int:
        """Memory of one position of one row over all layers. 0 before the first forward pass."""
        return sum(layer[0, :, 0].nbytes for layer in (*self.keys, *self.values))

    def reserve(self, need: Shape, promised: int, used: Shape) -> None:
        """Make room for `need`, keeping what is `used`. `promised`: positions that the longest row may ever need."""
        shape = grown(self.shape, need, promised, self.room)
        if shape == self.shape:
            return
        for layers in (self.keys, self.values):
            for index, old in enumerate(layers):
                new = _zeros(old, shape)
                new[: used.rows, :, : used.length] = old[: used.rows, :, : used.length]
                layers[index] = new
        self.shape = shape  # last: if memory runs out on the way, the old shape still fits every layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values [b, heads, T, size] of one layer; return those to attend to (transformers' API)."""
        if layer_idx == len(self.keys):
            self.keys.append(_zeros(key_states, self.shape))
            self.values.append(_zeros(value_states, self.shape))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        step = self.step
        if isinstance(step, PrefillStep):
            _fill(keys, key_states, step)
            _fill(values, value_states, step)
            return key_states, value_states
        assert step is not None
        keys[step.rows, :, step.positions] = key_states[:, :, 0]
        values[step.rows, :, step.positions] = value_states[:, :, 0]
        count = len(key_states)
        return keys[:count, :, : step.length], values[:count, :, : step.length]

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of some rows over others."""
        if not sources:
            return
        device = self.keys[0].device
        source, target = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for layer in (*self.keys, *self.values):
            layer[target, :, :length] = layer[source, :, :length]

    def wipe(self, rows: Sequence[int]) -> None:
        """Overwrite rows with zeros: a NaN left behind would reach the next sequence there through the mask."""
        for layer in (*self.keys, *self.values):
            for row in rows:
                layer[row] = 0


def _zeros(like: Tensor, shape: Shape) -> Tensor:
    """Return a layer, not empty but zeros: masked positions are multiplied by 0, which must not meet a NaN."""
    _, heads, _, size = like.shape
    return like.new_zeros(shape.rows, heads, shape.length, size)


def _fill(layer: Tensor, states: Tensor, step: PrefillStep) -> None:
    if len(step.source):
        stop = step.start + len(step.source)
        layer[step.start : stop, :, : states.shape[2]] = states[step.source]
