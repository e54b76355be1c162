"""What the engine keeps of one run: weights, gathered gradient, moments, step count.

All weights of an adapter lie in one vector, and A and B of every layer are views of it: an optimizer step is then a
handful of operations however many layers there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.engines.adamw import Moments, adamw, clipped
from services.trainer.engines.pending import Pending
from shared.contracts.training import AdamParams
from shared.errors import PermanentError
from shared.models.lora import Adapter


class RunState:
    """One run. The tensors of `adapter` require gradients, which the passes leave in their `grad`."""

    def __init__(self, adapter: Adapter) -> None:
        """Take over the values of `adapter`, any dtype, on the device where training happens."""
        self.weights = torch.cat([tensor.detach().float().flatten() for tensor in adapter.tensors()])
        self.adapter = _views(adapter, self.weights)
        self.moments = Moments(torch.zeros_like(self.weights), torch.zeros_like(self.weights))
        self.gradient: Tensor | None = None
        """fp32, as long as the weights. None: nothing was gathered since the last step."""
        self.step = 0
        self.pending: Pending | None = None
        """Parts of an operation that has not come to its end. No snapshot has them: a replay begins at the first."""

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what `to` makes of it. If that raises, nothing has changed."""
        moved = {id(tensor): to(tensor) for tensor in self._tensors()}
        self.weights = moved[id(self.weights)]
        self.adapter = _views(self.adapter, self.weights)
        self.moments = Moments(moved[id(self.moments.mean)], moved[id(self.moments.square)])
        if self.gradient is not None:
            self.gradient = moved[id(self.gradient)]
        if self.pending is not None and self.pending.gradient is not None:
            self.pending.gradient = moved[id(self.pending.gradient)]

    def _tensors(self) -> list[Tensor]:
        pending = self.pending.gradient if self.pending is not None else None
        found = (self.weights, self.moments.mean, self.moments.square, self.gradient, pending)
        return [tensor for tensor in found if tensor is not None]

    def take_gradient(self) -> Tensor:
        """Return the sum of what the passes left, as one vector, and clear it."""
        parts = []
        for tensor in self.adapter.tensors():
            parts.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
            tensor.grad = None
        return torch.cat([part.flatten() for part in parts])

    def forget_gradient(self) -> None:
        """Clear what a pass that broke off has left."""
        for tensor in self.adapter.tensors():
            tensor.grad = None

    def stepped(self, adam: AdamParams) -> NewState:
        """Return the state after the gathered gradient is applied; nothing changes, and no device is waited for."""
        if self.gradient is None:
            return NewState(self.weights, self.moments, torch.zeros(3, dtype=torch.float64), adam)
        norm = self.gradient.norm()
        gradient = clipped(self.gradient, norm, adam.grad_clip_norm)
        weights, moments = adamw(self.weights, gradient, self.moments, self.step + 1, adam)
        # A sum with an infinity or NaN in it is one, and those of finite fp32 numbers stay finite in fp64.
        check = weights.sum(dtype=torch.float64) + moments.square.sum(dtype=torch.float64)
        return NewState(weights, moments, torch.stack((norm, (weights - self.weights).norm(), check)), adam)

    def take(self, new: NewState) -> dict[str, float]:
        """Make what `stepped` returned the present state, and clear the gradient. Return the metrics of the step.

        Raise `PermanentError`, changing nothing, if the weights would no longer be finite.
        """
        norm, update, check = new.numbers.tolist()
        if not math.isfinite(check):
            raise PermanentError(
                f"the step would make weights or moments infinite or NaN (gradient norm {norm:g}, learning rate "
                f"{new.adam.learning_rate:g}): nothing was changed; a lower learning rate or clipping may help"
            )
        if new.weights is not self.weights:
            self.weights.copy_(new.weights)
        self.moments, self.gradient, self.step = new.moments, None, self.step + 1
        return {"grad_norm:mean": norm, "update_norm:mean": update, "step:max": float(self.step)}


@dataclass(frozen=True)
class NewState:
    """What an optimizer step leads to."""

    weights: Tensor
    moments: Moments
    numbers: Tensor
    """fp64 [3], on the device: norm of the gradient before clipping, norm of the update, and a sum that is finite if
    weights and moments are."""
    adam: AdamParams


def _views(adapter: Adapter, vector: Tensor) -> Adapter:
    """Return the adapter with its tensors replaced by views of `vector`."""
    pieces = torch.split(vector, [tensor.numel() for tensor in adapter.tensors()])
    views = {
        (path, which): piece.view_as(adapter.weights[path][which]).requires_grad_()
        for (path, which), piece in zip(adapter.places, pieces, strict=True)
    }
    return Adapter(adapter.spec, {path: (views[path, 0], views[path, 1]) for path in adapter.weights})
