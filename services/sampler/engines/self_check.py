"""Compares the engine's own passes with transformers' plain forward pass, once, before anything is served.

The engine runs the decoder with its own cache and attention and applies the head itself. An architecture that needs
more than that would give wrong tokens without any error, so it is found out here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.sampler.engines.batching import BLOCK, Room, Shape
from services.sampler.engines.forward import Forward
from services.sampler.engines.kv_cache import DecodeStep, PrefillStep
from shared.errors import UserError

PROMPT, DECODED = 12, 3
ROWS = 2
CHECKED = Room(rows=ROWS, positions=ROWS * BLOCK, prompt_tokens=PROMPT)
"""The room that `verify` needs."""
_TOLERANCE = {torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.1  # bfloat16 and float16, whose sums depend on the order


@torch.inference_mode()
def plain_logits(model: PreTrainedModel) -> Tensor:
    """Return transformers' logits [DECODED + 1, V] at the last positions of a fixed sequence."""
    logits = model(input_ids=_ids(model.device, model.config.vocab_size)[None], use_cache=False).logits
    last: Tensor = logits[0, PROMPT - 1 :].float()
    return last


@torch.inference_mode()
def verify(forward: Forward, expected: Tensor) -> None:
    """Raise `UserError` unless `forward` gives the `expected` logits of `plain_logits`, in two rows at once."""
    ids = _ids(forward.device, forward.vocabulary)
    rows = torch.arange(ROWS, device=forward.device)
    forward.cache.reserve(Shape(ROWS, BLOCK), BLOCK, Shape())
    hidden = forward.prefill(ids[None, :PROMPT], PrefillStep(0, torch.zeros_like(rows)), [])
    found = [forward.logits(hidden[0, -1:], [])]
    for position in range(PROMPT, PROMPT + DECODED):
        positions = torch.full_like(rows, position)
        step = DecodeStep(rows, positions, positions, BLOCK)
        found.append(forward.decode(ids[position].expand(ROWS), step, [])[1:])
    error = (torch.cat(found) - expected).abs().max() / expected.abs().max()
    if not error <= _TOLERANCE.get(hidden.dtype, _COARSE_TOLERANCE):
        raise UserError(
            f"this model cannot be sampled with the torch engine: its logits differ by {float(error):.2g} of their "
            "size from transformers' own; use the vllm engine"
        )


def _ids(device: torch.device, vocabulary: int) -> Tensor:
    return torch.arange(1, PROMPT + DECODED + 1, device=device) * 7919 % vocabulary
