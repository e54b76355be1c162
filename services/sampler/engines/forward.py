"""The base model with its adapters, as the two passes that generation consists of, and its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from services.sampler.engines.cached_attention import NAME
from services.sampler.engines.kv_cache import DecodeStep, PrefillStep, RowCache
from shared.models.lora import AdapterBank, Segment

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN's, which plans anew for every batch size and length: 0.3 ms of CPU a layer on an H100, torch 2.11."""


class Forward:
    """Computes hidden states and logits of a model; the rows of a batch go through their policies' adapters."""

    def __init__(self, model: PreTrainedModel, cache: RowCache) -> None:
        model.set_attn_implementation(NAME)
        self.model = model
        self.bank = AdapterBank(model)
        self.cache = cache
        self.device: torch.device = model.device
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self._decoder: Any = model.base_model
        self._head: Any = model.get_output_embeddings()
        self._cap: float | None = getattr(model.config, "final_logit_softcapping", None)

    def prefill(self, ids: Tensor, step: PrefillStep, segments: Sequence[Segment]) -> Tensor:
        """Compute prompts ids [b, T] and store their keys and values; return hidden states [b, T, hidden].

        `segments` are ranges of the b prompts.
        """
        length = ids.shape[1]
        wide = [(key, start * length, stop * length) for key, start, stop in segments]
        return self._run(ids, torch.arange(length, device=self.device)[None], step, wide)

    def decode(self, tokens: Tensor, step: DecodeStep, segments: Sequence[Segment]) -> Tensor:
        """Compute one token of each row, tokens [n]; return the logits [n, V] of the next ones, float32."""
        hidden = self._run(tokens[:, None], step.positions[:, None], step, segments)
        return self.logits(hidden[:, 0], segments)

    def logits(self, hidden: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return the logits [n, V] of hidden states [n, hidden], float32; `segments` are ranges of the n rows."""
        with self.bank.use(segments):
            logits: Tensor = self._head(hidden).float()
        return logits if self._cap is None else logits.div_(self._cap).tanh_().mul_(self._cap)

    def _run(
        self, ids: Tensor, positions: Tensor, step: PrefillStep | DecodeStep, segments: Sequence[Segment]
    ) -> Tensor:
        self.cache.step = step
        with self.bank.use(segments), sdpa_kernel(_KERNELS):
            out = self._decoder(
                input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, step=step
            )
        hidden: Tensor = out.last_hidden_state
        return hidden
