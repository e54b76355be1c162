"""Draws samples inside vLLM's worker, as a logits processor: the same tokens as the torch engine for the same logits.

See `vllm_wire` for what the changed logits mean. How far a sequence is, which its random number depends on, is read
from the list of its tokens, which vLLM keeps; while a step is on its way it holds placeholders, so its length is right
where its entries are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from services.sampler.engines.drawing import Drawing, draw, likeliest, uniforms
from services.sampler.engines.vllm_wire import DRAWING
from shared.contracts.sampling import SamplingParams


@dataclass(frozen=True)
class _Row:
    params: SamplingParams
    key: int
    width: int
    tokens: list[int]
    """Of the sample so far; vLLM's own list."""


class Drawer(LogitsProcessor):  # type: ignore[misc]  # vLLM is in an environment of its own
    """Replaces the logits of a batch by what has been drawn from them."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:  # noqa: FBT001
        """As vLLM calls it."""
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._batch: _Batch | None = None

    def is_argmax_invariant(self) -> bool:
        """It changes which token is the likeliest: that is what it is for."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow which sequence is in which row."""
        if process_dict_updates(self._rows, batch_update, _row):
            self._batch = None

    def apply(self, logits: Tensor) -> Tensor:
        """Draw a token for each row of logits [n, V] (float32, overwritten)."""
        if not self._rows:
            return logits
        if self._batch is None:
            self._batch = _Batch.of(self._rows, self._device)
        return self._batch.draw(logits)


@dataclass(frozen=True)
class _Batch:
    """Rows that are drawn together, until vLLM changes the batch."""

    rows: list[_Row]
    places: Tensor | None
    """In the logits; None: all, in order."""
    keys: Tensor
    drawing: Drawing
    wide: Tensor | None
    """Which rows want the likeliest tokens."""
    width: int

    @classmethod
    def of(cls, rows: dict[int, _Row], device: torch.device) -> _Batch:
        places = sorted(rows)
        ordered = [rows[place] for place in places]
        wide = [index for index, row in enumerate(ordered) if row.width]
        return cls(
            rows=ordered,
            places=None if places == list(range(len(places))) else torch.tensor(places, device=device),
            keys=torch.tensor([row.key for row in ordered], dtype=torch.int64, device=device),
            drawing=Drawing.of([row.params for row in ordered], device),
            wide=torch.tensor(wide, device=device) if wide else None,
            width=max(row.width for row in ordered),
        )

    def draw(self, logits: Tensor) -> Tensor:
        if self.places is None and len(self.rows) == len(logits):
            return self._drawn(logits)
        places = torch.arange(len(self.rows), device=logits.device) if self.places is None else self.places
        logits[places] = self._drawn(logits[places])
        return logits

    def _drawn(self, logits: Tensor) -> Tensor:
        counts = torch.tensor([len(row.tokens) for row in self.rows], dtype=torch.int64).to(logits.device)
        best = self._likeliest(logits)
        tokens, logprobs = draw(logits, self.drawing, uniforms(self.keys, counts))
        logits.fill_(-torch.inf)
        if best is not None and self.wide is not None:
            logits[self.wide] = logits[self.wide].scatter(1, *best)
        found = torch.where(logprobs.isfinite(), (-logprobs).clamp(min=0), torch.inf)
        return logits.scatter_(1, tokens.clamp(0, logits.shape[1] - 1)[:, None], found[:, None])

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.wide is None:
            return None
        scales = 1.0 if self.drawing.temperatures is None else self.drawing.temperatures[self.wide]
        return likeliest(logits[self.wide], min(self.width, logits.shape[1]), scales)


def _row(params: Any, prompt: list[int] | None, tokens: list[int]) -> _Row | None:
    given = (params.extra_args or {}).get(DRAWING)
    if given is None:
        return None
    asked = SamplingParams(temperature=given["temperature"], top_k=given["top_k"], top_p=given["top_p"])
    return _Row(asked, given["key"], given["width"], tokens)
