"""Trains many runs on one frozen base model with PyTorch, in packed passes (see `base.TrainerEngine`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.trainer.engines.base import PassItem, PassOutcome, StepOutcome
from services.trainer.engines.batch import Batch, Limits, check_batch
from services.trainer.engines.body import AdaptedModel, Body
from services.trainer.engines.fused.layers import FusedLayers, FusedOptions, supported
from services.trainer.engines.passes import PassRunner, PassSettings
from services.trainer.engines.run_state import RunState
from services.trainer.engines.state_file import read_state, write_state
from services.trainer.engines.work import Work
from shared.contracts.arrays import Float32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams
from shared.errors import MeshError, PermanentError, UserError
from shared.models.adapter_files import to_peft
from shared.models.loading import load_base
from shared.models.lora import Adapter, AdapterBank

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
        self._states: dict[str, RunState] = {}

    def _body(self, fused: FusedOptions | None, *, share_prefixes: bool) -> Body:
        if fused is not None and supported(self._model):
            return FusedLayers(self._model, dataclasses.replace(fused, share_prefixes=share_prefixes))
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
        """Begin a run with a fresh adapter. Raise `UserError` if it exists, trains nothing or finds no memory."""
        if run in self._states:
            raise UserError(f"run {run!r} exists already: choose another name or drop it first")
        try:
            self._hold(run, RunState(Adapter.fresh(self._model, lora)))
        except torch.OutOfMemoryError:
            self.drop_run(run)
            raise UserError(f"no memory is left on {self._device} for run {run!r} of rank {lora.rank}") from None

    def forward_backward(self, items: Sequence[PassItem]) -> list[PassOutcome]:
        """Run sequences of many runs through packed passes; gradients add to each run's own."""
        checked = self._check(items)
        batches = [batch for batch in checked if isinstance(batch, Batch)]
        outcomes: dict[str, PassOutcome] = {}
        if batches:
            work = Work(batches, self._device)
            self._runner.run(work, self._states)
            outcomes = {batch.run: self._settle(work, batch, places) for batch, places in work.places_by_run()}
        return [outcomes[each.run] if isinstance(each, Batch) else PassOutcome(error=each) for each in checked]

    def _check(self, items: Sequence[PassItem]) -> list[Batch | MeshError]:
        """Return for each item its batch, or why it is refused."""
        checked: list[Batch | MeshError] = []
        seen: set[str] = set()
        for item in items:
            try:
                self._state(item.run)
                if item.run in seen:
                    raise UserError(f"run {item.run!r} appears twice in a pass")
                checked.append(check_batch(item, self._limits))
                seen.add(item.run)
            except UserError as error:
                checked.append(error)
        return checked

    def _settle(self, work: Work, batch: Batch, places: slice) -> PassOutcome:
        """Add a run's gradient to what it has gathered, unless anything is not finite."""
        if batch.run in work.failures:
            return PassOutcome(error=work.failures[batch.run])
        logprobs = work.logprobs[places]
        metrics = batch.loss.metrics(logprobs, work.given[places])
        if not (math.isfinite(metrics["loss:sum"]) and logprobs.isfinite().all()):
            return PassOutcome(error=_not_finite(f"the loss is {metrics['loss:sum']}"))
        if batch.backward:
            state = self._states[batch.run]
            gathered = _sum(state.gradient, work.gradients.get(batch.run), state.weights)
            if not gathered.isfinite().all():
                return PassOutcome(error=_not_finite("the gradient is infinite or NaN"))
            state.gradient = gathered
        return PassOutcome(metrics=metrics, logprobs=_by_sequence(logprobs, batch.lengths))

    def optim_step(self, steps: Mapping[str, AdamParams]) -> dict[str, StepOutcome]:
        """Apply AdamW to each run's gathered gradient and clear it."""
        return {run: self._step(run, adam) for run, adam in steps.items()}

    def _step(self, run: str, adam: AdamParams) -> StepOutcome:
        try:
            _check_adam(adam)
            return StepOutcome(metrics=self._state(run).optim_step(adam))
        except PermanentError as error:
            return StepOutcome(error=error)
        except torch.OutOfMemoryError:
            return StepOutcome(error=PermanentError(f"no memory is left on {self._device} for the step of run {run!r}"))

    def export_adapter(self, run: str) -> dict[str, bytes]:
        """Return the run's weights as PEFT's two files, by name. Raise `UserError` for an unknown run."""
        return to_peft(self._state(run).adapter, self._base_model)

    def snapshot(self, run: str) -> bytes:
        """Return everything of a run as a safetensors file. Raise `UserError` for an unknown run."""
        return write_state(self._state(run), self._base_model)

    def restore(self, run: str, state: bytes) -> None:
        """Bring a run back from `snapshot`. Raise `PermanentError`, changing nothing, if it does not fit."""
        self._hold(run, read_state(state, self._base_model, self._model))

    def drop_run(self, run: str) -> None:
        """Forget a run and free its memory. Unknown runs are ignored."""
        self._states.pop(run, None)
        self._bank.remove(run)

    def _hold(self, run: str, state: RunState) -> None:
        self._states[run] = state
        self._bank.add(run, state.adapter)

    def _state(self, run: str) -> RunState:
        if run not in self._states:
            raise UserError(f"run {run!r} is not on this trainer: create or restore it first")
        return self._states[run]


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


def _by_sequence(logprobs: Tensor, lengths: Sequence[int]) -> list[Float32s]:
    parts = torch.split(logprobs.cpu(), list(lengths))
    return [Float32s(part.tolist()) for part in parts]


def _not_finite(what: str) -> PermanentError:
    return PermanentError(f"{what}: this batch was left out; the run's weights may have diverged")
