"""An operation that goes through several passes: what its parts gave, kept apart from the run until the last is done.

Metrics are computed once, over the tokens of all parts: whatever their reductions, they are those of the undivided
operation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.trainer.engines.batch import Batch
from shared.models.losses import Given


@dataclass
class Pending:
    """The parts that are done."""

    gradient: Tensor | None = None
    """Their sum, fp32, as long as the run's weights. None: no part had one."""
    logprobs: list[Tensor] = field(default_factory=list)
    """Of each part, fp32 [M] on the CPU, as is `given`."""
    given: list[Given] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Of each sequence, in targets."""

    def add(self, batch: Batch, logprobs: Tensor, given: Given, gradient: Tensor | None) -> None:
        """Take in a part; `gradient` is the sum with that of the parts before."""
        self.gradient = gradient
        self.logprobs.append(logprobs)
        self.given.append(given)
        self.lengths += batch.lengths

    def all_logprobs(self) -> Tensor:
        """Return those of all parts, fp32 [M]."""
        return torch.cat(self.logprobs)

    def all_given(self) -> Given:
        """Return what came with the tokens of all parts."""
        return Given.join(self.given)
