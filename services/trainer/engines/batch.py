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
    """One run's checked part in a pass. Its data stand one behind the other, M tokens in all, on the CPU."""

    run: str
    loss: Loss
    backward: bool
    sequences: list[array[int]]
    targets: Tensor
    """int64 [M]."""
    given: Given
    """fp32 [M]."""

    @property
    def size(self) -> int:
        """M."""
        return self.targets.shape[0]


def check_batch(item: PassItem, limits: Limits) -> Batch:
    """Raise `UserError` naming the datum, the value and the rule for the first thing that is wrong."""
    loss = make_loss(item.loss)
    if not item.data:
        raise UserError("the batch is empty: give at least one datum")
    for index, datum in enumerate(item.data):
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
        targets=targets.long(),
        given=_given(checks, loss),
    )


def _check_lengths(index: int, datum: Datum, loss: Loss, limits: Limits) -> None:
    length = len(datum.tokens)
    if not length:
        raise UserError(f"datum {index} has no tokens")
    if length > limits.context:
        raise UserError(f"datum {index} has {length} tokens, but the model's context holds {limits.context}")
    for name in ("targets", "weights", "logprobs", "advantages"):
        values = getattr(datum, name)
        if values is None and loss.needs_policy and name != "weights":
            raise UserError(f"datum {index} has no {name}, which {loss.name} needs")
        if values is not None and len(values) != length:
            raise UserError(f"datum {index} has {len(values)} {name} for {length} tokens: give one for each token")


def _given(checks: _Checks, loss: Loss) -> Given:
    """Check weights and, where the loss reads them, log-probabilities and advantages."""
    weights = checks.join("weights")
    checks.refuse("weights", weights, ~weights.isfinite(), "it must be a finite number")
    if not loss.needs_policy:
        nothing = torch.zeros_like(weights)
        return Given(weights, nothing, nothing)
    checks.refuse("weights", weights, (weights != 0) & (weights != 1), f"for {loss.name} it must be 0 or 1")
    policy = []
    for name in ("logprobs", "advantages"):
        # A masked token has no say, so it needs no value either: NaN is how the wire writes a missing one.
        values = torch.where(weights == 0, 0.0, checks.join(name))
        checks.refuse(name, values, ~values.isfinite(), "it must be a finite number")
        policy.append(values)
    return Given(weights, *policy)


class _Checks:
    """Joins the data of a batch and names the place of a bad value."""

    def __init__(self, data: Sequence[Datum]) -> None:
        self._data = data
        self._ends = list(accumulate(len(datum.tokens) for datum in data))

    def join(self, name: str) -> Tensor:
        """Return an array of all data one behind the other; 1 where a datum has none. A copy, never the message."""
        return torch.cat([self._tensor(getattr(datum, name), len(datum.tokens)) for datum in self._data])

    def refuse(self, name: str, values: Tensor, bad: Tensor, rule: str) -> None:
        """Raise `UserError` for the first of `values` that is bad."""
        if bool(bad.any()):
            place = int(bad.int().argmax())
            index = bisect_right(self._ends, place)
            within = place - (self._ends[index - 1] if index else 0)
            raise UserError(f"datum {index}: {name}[{within}] is {values[place].item():g}, {rule}")

    @staticmethod
    def _tensor(values: array[int] | array[float] | None, length: int) -> Tensor:
        if values is None:
            return torch.ones(length)
        return torch.frombuffer(values, dtype=torch.int32 if values.typecode == "i" else torch.float32)
