"""Checks what a run asks to be trained on, before anything is computed, and turns it into tensors."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from services.trainer.engines.base import PassItem
from shared.contracts.training import Datum
from shared.errors import UserError
from shared.models.losses import Given, Loss, make_loss


@dataclass(frozen=True)
class Limits:
    """What the base model can take."""

    vocabulary: int
    context: int
    """Longest sequence, in tokens."""


@dataclass(frozen=True)
class Batch:
    """One run's checked part in a pass. Its data stand one behind the other, M targets in all, on the CPU."""

    run: str
    loss: Loss
    backward: bool
    sequences: list[array[int]]
    widths: list[int]
    """Of each sequence, how many targets a token has."""
    targets: Tensor
    """int64 [M], those of a token one behind the other."""
    given: Given
    """fp32 [M]."""

    @property
    def size(self) -> int:
        """M."""
        return self.targets.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Of each sequence, its number of targets."""
        return [len(tokens) * width for tokens, width in zip(self.sequences, self.widths, strict=True)]


def check_batch(item: PassItem, limits: Limits) -> Batch:
    """Raise `UserError` naming the datum, the value and the rule for the first thing that is wrong."""
    loss = make_loss(item.loss)
    if not item.data:
        raise UserError("the batch is empty: give at least one datum")
    for index, datum in enumerate(item.data):
        _check_width(index, datum, loss, limits)
        _check_lengths(index, datum, loss, limits)
    checks = _Checks(item.data)
    tokens, targets = checks.join("tokens"), checks.join("targets")
    for name, ids in (("tokens", tokens), ("targets", targets)):
        rule = f"token ids of this model go from 0 to {limits.vocabulary - 1}"
        checks.refuse(name, ids, (ids < 0) | (ids >= limits.vocabulary), rule)
    return Batch(
        run=item.run,
        loss=loss,
        backward=not item.forward_only,
        sequences=[datum.tokens for datum in item.data],
        widths=[datum.targets_per_token for datum in item.data],
        targets=targets.long(),
        given=_given(checks, loss),
    )


def _check_width(index: int, datum: Datum, loss: Loss, limits: Limits) -> None:
    width = datum.targets_per_token
    if width != 1 and loss.needs_policy:
        raise UserError(f"datum {index} has targets_per_token {width}: {loss.name} takes one target for each token")
    if not 1 <= width <= limits.vocabulary:
        raise UserError(f"datum {index} has targets_per_token {width}: it must be from 1 to {limits.vocabulary}")


def _check_lengths(index: int, datum: Datum, loss: Loss, limits: Limits) -> None:
    length = len(datum.tokens)
    if not length:
        raise UserError(f"datum {index} has no tokens")
    if length > limits.context:
        raise UserError(f"datum {index} has {length} tokens, but the model's context holds {limits.context}")
    for name in ("targets", "weights", "logprobs", "advantages", "ratio_mask"):
        values = getattr(datum, name)
        if values is None and loss.needs_policy and name in ("logprobs", "advantages"):
            raise UserError(f"datum {index} has no {name}, which {loss.name} needs")
        each = datum.targets_per_token if name in ("targets", "weights") else 1
        if values is not None and len(values) != length * each:
            rule = "one" if each == 1 else f"{each}, its targets_per_token,"
            raise UserError(f"datum {index} has {len(values)} {name} for {length} tokens: give {rule} for each token")


def _given(checks: _Checks, loss: Loss) -> Given:
    """Check weights and, where the loss reads them, log-probabilities, advantages and the mask of the ratio."""
    weights = checks.join("weights")
    nothing = torch.zeros_like(weights)
    checks.refuse("weights", weights, ~weights.isfinite(), "it must be a finite number")
    if not loss.needs_policy:
        return Given(weights, nothing, nothing, nothing, nothing)
    checks.refuse("weights", weights, (weights != 0) & (weights != 1), f"for {loss.name} it must be 0 or 1")
    mask = _ratio_mask(checks) if loss.needs_sequences else nothing
    # A masked token has no say, so it needs no value either: NaN is how the wire writes a missing one.
    policy = checks.finite("logprobs", (weights != 0) | (mask != 0)), checks.finite("advantages", weights != 0)
    return Given(weights, *policy, mask, nothing)


def _ratio_mask(checks: _Checks) -> Tensor:
    """Check the tokens whose ratios make up that of their sequence."""
    mask = checks.join("ratio_mask", otherwise="weights")
    checks.refuse("ratio_mask", mask, (mask != 0) & (mask != 1), "it must be 0 or 1")
    for index, (marks, weights) in enumerate(
        zip(checks.split(mask), checks.split(checks.join("weights")), strict=True)
    ):
        if weights.any() and not marks.any():
            raise UserError(f"datum {index} has a ratio_mask of zeros: mark the tokens that make up its ratio with 1")
    return mask


class _Checks:
    """Joins the data of a batch and names the place of a bad value."""

    def __init__(self, data: Sequence[Datum]) -> None:
        self._data = data

    def join(self, name: str, otherwise: str = "") -> Tensor:
        """Return an array of all data one behind the other, as a copy, never the message.

        A datum that has none counts as having the array `otherwise`, and one that has neither as having ones.
        """
        parts = []
        for datum, length in zip(self._data, self._lengths(name), strict=True):
            values = getattr(datum, name)
            if values is None and otherwise:
                values = getattr(datum, otherwise)
            parts.append(_tensor(values, length))
        return torch.cat(parts)

    def finite(self, name: str, where: Tensor) -> Tensor:
        """Return an array of all data with zeros outside of `where`; refuse what is not finite inside."""
        values = torch.where(where, self.join(name), 0.0)
        self.refuse(name, values, ~values.isfinite(), "it must be a finite number")
        return values

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """Return the parts of each datum again, of an array with a value for each target."""
        return torch.split(values, self._lengths("targets"))

    def refuse(self, name: str, values: Tensor, bad: Tensor, rule: str) -> None:
        """Raise `UserError` for the first of `values` that is bad."""
        if bool(bad.any()):
            place = int(bad.int().argmax())
            ends = list(accumulate(self._lengths(name)))
            index = bisect_right(ends, place)
            within = place - (ends[index - 1] if index else 0)
            raise UserError(f"datum {index}: {name}[{within}] is {values[place].item():g}, {rule}")

    def _lengths(self, name: str) -> list[int]:
        """Return how many values each datum has. What is not of tokens is of targets: policy losses have one each."""
        return [len(datum.tokens) * (1 if name == "tokens" else datum.targets_per_token) for datum in self._data]


def _tensor(values: array[int] | array[float] | None, length: int) -> Tensor:
    if values is None:
        return torch.ones(length)
    return torch.frombuffer(values, dtype=torch.int32 if values.typecode == "i" else torch.float32)
