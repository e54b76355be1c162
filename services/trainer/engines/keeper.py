"""Where an engine's runs are: on the device, ready for a pass, or parked in host memory.

A parked run keeps every bit of its state and comes back when it is next needed. Host memory is pinned where there is a
GPU, so that copies go at the speed of the bus; on a CPU parking is a copy from memory to memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from services.trainer.engines.base import NoRoom
from services.trainer.engines.run_state import RunState
from shared.errors import UserError
from shared.models.lora import AdapterBank


class Keeper:
    """The runs of one engine."""

    def __init__(self, bank: AdapterBank, device: torch.device) -> None:
        self.states: dict[str, RunState] = {}
        self.parked: set[str] = set()
        self._bank = bank
        self._device = device

    def here(self, run: str) -> RunState:
        """Return a run that is on the device, bringing it back first. Raise `UserError` if it is unknown."""
        if run in self.parked:
            self.bring_back(run)
        return self.of(run)

    def of(self, run: str) -> RunState:
        """Return a run wherever it is. Raise `UserError` if it is unknown."""
        if run not in self.states:
            raise UserError(f"run {run!r} is not on this trainer: create or restore it first")
        return self.states[run]

    def hold(self, run: str, make: Callable[[], RunState]) -> None:
        """Take in what `make` puts on the device, in the place of what is there. Raise `NoRoom`."""
        try:
            state = make()
            self._bank.add(run, state.adapter)
        except torch.OutOfMemoryError:
            self._bank.remove(run)
            raise self.no_room(f"run {run!r}") from None
        self.states[run] = state
        self.parked.discard(run)

    def park(self, run: str) -> None:
        """Move a run to host memory. Unknown and parked ones stay as they are."""
        if run in self.states and run not in self.parked:
            self._bank.remove(run)
            self.states[run].move(_to_host)
            self.parked.add(run)

    def bring_back(self, run: str) -> None:
        """Move a run to the device. Raise `NoRoom`, leaving it parked, if it does not fit."""
        if run not in self.parked:
            return
        try:
            self.states[run].move(self._to_device)
            self._bank.add(run, self.states[run].adapter)
        except torch.OutOfMemoryError:
            raise self.no_room(f"run {run!r}") from None
        self.parked.remove(run)

    def drop(self, run: str) -> None:
        """Forget a run. Unknown ones are ignored."""
        self.states.pop(run, None)
        self.parked.discard(run)
        self._bank.remove(run)

    def no_room(self, what: str) -> NoRoom:
        """Return the error that says so; what others could use is given back to the device first."""
        torch.cuda.empty_cache()
        return NoRoom(f"no memory is left on {self._device} for {what}")

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


def _to_host(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor)
