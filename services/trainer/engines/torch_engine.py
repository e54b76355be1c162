"""Trains many runs on one frozen base model with PyTorch, in packed passes (see `base.TrainerEngine`)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.trainer.engines.base import PassItem, PassOutcome, StepOutcome
from services.trainer.engines.batch import Batch, Limits, check_batch
from services.trainer.engines.body import AdaptedModel, Body
from services.trainer.engines.fused import self_check
from services.trainer.engines.fused.layers import FusedLayers, FusedOptions, supported
from services.trainer.engines.keeper import Keeper
from services.trainer.engines.passes import PassRunner, PassSettings
from services.trainer.engines.pending import Pending
from services.trainer.engines.run_state import NewState, RunState
from services.trainer.engines.state_file import begun_from, read_state, write_state
from services.trainer.engines.work import Work
from shared.contracts.arrays import Float32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams
from shared.errors import MeshError, PermanentError, UserError
from shared.models.adapter_files import to_peft
from shared.models.loading import load_base
from shared.models.lora import Adapter, AdapterBank
from shared.models.losses import Loss

log = logging.getLogger(__name__)

STEPS_AT_A_TIME = 16
"""Runs whose next state is held beside the present one."""
LARGEST_SETTING = 1e6
"""Of learning rate, eps and weight decay: far beyond use, and far below where their products leave fp32."""


class TorchTrainerEngine:
    """One frozen base model with the adapters of any number of runs."""

    def __init__(
        self,
        base_model: str,
        model: PreTrainedModel | str | Path,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        max_pass_tokens: int | None = None,
        max_logits: int | None = None,
        share_prefixes: bool = True,
        fused: FusedOptions | None = None,
    ) -> None:
        """Serve runs of `base_model`, the name that they ask for.

        `model` is loaded already, or a directory or hub name to be loaded on `device` in `dtype` (see `load_base`).
        `max_pass_tokens` bounds the tokens that go through the model at a time; None: 8192 on CUDA, 1024 elsewhere.
        `max_logits` bounds the logits held at a time; None: 2**28 on CUDA, 2**24 elsewhere. Both only cut the work:
        results do not depend on them. `share_prefixes` computes common beginnings of a run's sequences once. With
        `fused` the layers are computed by our own functions, if they serve the model's family; otherwise, and with
        None, by the model's modules. Raise `UserError` if the model cannot be loaded.
        """
        self._base_model = base_model
        self._model = model if isinstance(model, PreTrainedModel) else load_base(model, device=device, dtype=dtype)
        self._device: torch.device = self._model.device
        cuda = self._device.type == "cuda"
        self._bank = AdapterBank(self._model)
        config = self._model.config
        vocabulary = self._model.get_input_embeddings().num_embeddings
        self._limits = Limits(vocabulary=vocabulary, context=config.max_position_embeddings)
        settings = PassSettings(
            max_rows=max_pass_tokens or (8192 if cuda else 1024),
            head_rows=max(1, (max_logits or 2 ** (28 if cuda else 24)) // vocabulary),
        )
        self._runner = PassRunner(self._body(fused, share_prefixes=share_prefixes), self._model, self._bank, settings)
        self._keeper = Keeper(self._bank, self._device)
        self._states = self._keeper.states

    def _body(self, fused: FusedOptions | None, *, share_prefixes: bool) -> Body:
        if fused is not None and supported(self._model):
            layers = FusedLayers(self._model, dataclasses.replace(fused, share_prefixes=share_prefixes))
            apart = self_check.error(self._model, self._bank, layers)
            if apart <= self_check.tolerance(self._model):
                return layers
            log.error("fused layers are not used: they differ by %.2g from the model's own modules here", apart)
        # Measured with SmolLM2-135M (hidden 576) on a CPU: a token costs as much as about 1,100 attention pairs.
        pairs = 2 * self._model.config.hidden_size if share_prefixes else None
        return AdaptedModel(self._model, self._bank, pairs)

    @property
    def base_model(self) -> str:
        """Name under which runs ask for this model."""
        return self._base_model

    @property
    def runs(self) -> frozenset[str]:
        """Runs that are present."""
        return frozenset(self._states)

    def create_run(self, run: str, lora: LoraSpec) -> None:
        """Begin a run with a fresh adapter. Raise `NoRoom`, or `UserError` if it exists or trains nothing."""
        if run in self._states:
            raise UserError(f"run {run!r} exists already: choose another name or drop it first")
        self._keeper.hold(run, lambda: RunState(Adapter.fresh(self._model, lora)))

    def forward_backward(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """Run sequences of many runs through packed passes; gradients add to each run's own."""
        checked = self._check(items)
        batches = [batch for batch in checked if isinstance(batch, Batch)]
        outcomes: dict[str, PassOutcome] = {}
        if batches:
            work = Work(batches, self._device)
            self._runner.run(work, self._states)
            work.to_host()
            lasts = {item.run: not item.rest for item in items}
            for batch, places in work.places_by_run():
                outcomes[batch.run] = self._settle(work, batch, places, last=lasts[batch.run])
        return [outcomes[each.run] if isinstance(each, Batch) else PassOutcome(error=each) for each in checked]

    def _check(self, items: Sequence[PassItem]) -> list[Batch | MeshError]:
        """Return for each item its batch, or why it is refused."""
        checked: list[Batch | MeshError] = []
        seen: set[str] = set()
        for item in items:
            try:
                self._keeper.here(item.run)
                if item.run in seen:
                    raise UserError(f"run {item.run!r} appears twice in a pass")
                checked.append(self._begun(item))
                seen.add(item.run)
            except UserError as error:
                checked.append(error)
        return checked

    def _begun(self, item: PassItem) -> Batch:
        """Check an item: at its first part the whole operation, so that no pass is spent on one that will fail."""
        state = self._states[item.run]
        pending, state.pending = state.pending, None
        if item.first:
            pending = None
            if item.rest:
                check_batch(dataclasses.replace(item, data=[*item.data, *item.rest]), self._limits)
        elif pending is None:
            raise UserError(f"run {item.run!r} has no earlier part of this operation: send it from the beginning")
        batch = check_batch(item, self._limits)
        state.pending = pending
        return batch

    def _settle(self, work: Work, batch: Batch, places: slice, *, last: bool) -> PassOutcome:
        """Keep what a part gave; after the last, add the operation's gradient to the run's. Errors undo all parts."""
        state = self._states[batch.run]
        try:
            if batch.run in work.failures:
                raise work.failures[batch.run]
            pending = state.pending or Pending()
            self._add(pending, work, batch, places)
            outcome = _joined(pending, batch.loss, state) if last else PassOutcome()
        except PermanentError as error:
            state.pending = None
            return PassOutcome(error=error)
        except torch.OutOfMemoryError:
            state.pending = None
            return PassOutcome(error=self._keeper.no_room(f"the gradient of run {batch.run!r}"))
        state.pending = None if last else pending
        return outcome

    def _add(self, pending: Pending, work: Work, batch: Batch, places: slice) -> None:
        logprobs, given, gradient = work.logprobs[places], work.given[places], pending.gradient
        if not logprobs.isfinite().all():
            raise _not_finite(f"the loss is {batch.loss.metrics(logprobs, given)['loss:sum']}")
        if batch.backward:
            gradient = _sum(gradient, work.gradients.get(batch.run), self._states[batch.run].weights)
        pending.add(batch, logprobs, given, gradient)

    def optim_step(self, steps: Mapping[str, AdamParams]) -> dict[str, StepOutcome]:
        """Apply AdamW to each run's gathered gradient and clear it."""
        outcomes: dict[str, StepOutcome] = {}
        runs = list(steps.items())
        for first in range(0, len(runs), STEPS_AT_A_TIME):
            # All are launched before the first is waited for.
            begun = {run: self._begin_step(run, adam) for run, adam in runs[first : first + STEPS_AT_A_TIME]}
            outcomes |= {run: self._end_step(run, step) for run, step in begun.items()}
        return outcomes

    def _begin_step(self, run: str, adam: AdamParams) -> NewState | StepOutcome:
        try:
            _check_adam(adam)
            return self._keeper.here(run).stepped(adam)
        except PermanentError as error:
            return StepOutcome(error=error)
        except torch.OutOfMemoryError:
            return StepOutcome(error=self._keeper.no_room(f"the step of run {run!r}"))

    def _end_step(self, run: str, step: NewState | StepOutcome) -> StepOutcome:
        if isinstance(step, StepOutcome):
            return step
        try:
            return StepOutcome(metrics=self._states[run].take(step))
        except PermanentError as error:
            return StepOutcome(error=error)

    def export_adapter(self, run: str) -> dict[str, bytes]:
        """Return the run's weights as PEFT's two files, by name. Raise `UserError` for an unknown run."""
        return to_peft(self._keeper.of(run).adapter, self._base_model)

    def snapshot(self, run: str) -> bytes:
        """Return everything of a run as a safetensors file. Raise `UserError` for an unknown run."""
        return write_state(self._keeper.of(run), self._base_model)

    def restore(self, run: str, state: bytes) -> None:
        """Bring a run back from `snapshot`. Raise `NoRoom` or `PermanentError`, changing nothing."""
        self._keeper.hold(run, lambda: read_state(state, self._base_model, self._model))

    def begun_from(self, state: bytes, lora: LoraSpec, *, optimizer: bool) -> bytes:
        """Return the state of a run that begins with that of another. Raise `UserError` or `PermanentError`."""
        return begun_from(state, self._base_model, self._model, lora, optimizer=optimizer)

    def park(self, run: str) -> None:
        """Move all of a run to host memory."""
        self._keeper.park(run)
        self._runner.try_large_passes()

    def bring_back(self, run: str) -> None:
        """Move a parked run to the device. Raise `NoRoom`, leaving it parked."""
        self._keeper.bring_back(run)

    def size_of(self, run: str) -> int:
        """Return the bytes of a run's state. Raise `UserError` for an unknown run."""
        return self._keeper.of(run).size

    def drop_run(self, run: str) -> None:
        """Forget a run and free its memory. Unknown runs are ignored."""
        self._keeper.drop(run)
        self._runner.try_large_passes()


def _check_adam(adam: AdamParams) -> None:
    """Refuse what fp32 cannot compute with. The message's own bounds let infinity pass."""
    for name in ("learning_rate", "eps", "weight_decay"):
        if not 0 <= getattr(adam, name) <= LARGEST_SETTING:
            raise UserError(f"{name} is {getattr(adam, name)}, it must be from 0 to {LARGEST_SETTING:g}")


def _sum(gathered: Tensor | None, gradient: Tensor | None, weights: Tensor) -> Tensor:
    """Return both gradients' sum; a pass in which no token could move counts as a gradient of zero."""
    if gradient is None:
        gradient = torch.zeros_like(weights)
    return gradient if gathered is None else gathered + gradient


def _joined(pending: Pending, loss: Loss, state: RunState) -> PassOutcome:
    """Return the outcome of all parts, their gradient added to the run's, unless anything is not finite."""
    logprobs = pending.all_logprobs()
    metrics = loss.metrics(logprobs, pending.all_given())
    if not math.isfinite(metrics["loss:sum"]):
        raise _not_finite(f"the loss is {metrics['loss:sum']}")
    if pending.gradient is not None:
        gathered = _sum(state.gradient, pending.gradient, state.weights)
        if not gathered.isfinite().all():
            raise _not_finite("the gradient is infinite or NaN")
        state.gradient = gathered
    parts = torch.split(logprobs, pending.lengths)
    return PassOutcome(metrics=metrics, logprobs=[_floats(part) for part in parts])


def _floats(values: Tensor) -> Float32s:
    array = Float32s()
    array.frombytes(values.numpy().tobytes())
    return array


def _not_finite(what: str) -> PermanentError:
    return PermanentError(f"{what}: this batch was left out; the run's weights may have diverged")
