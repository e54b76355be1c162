"""Puts the parts of the torch engine together: loads the model, finds its limits, checks that it is computed right."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from services.sampler.engines.batching import BLOCK, Room
from services.sampler.engines.forward import Forward
from services.sampler.engines.generation import Generation
from services.sampler.engines.kv_cache import RowCache
from services.sampler.engines.limits import Limits, cache_bytes
from services.sampler.engines.self_check import CHECKED, plain_logits, verify
from shared.errors import UserError
from shared.models.loading import load_base

_PREFILL_TOKENS = {"cuda": 8192}
_SLOW_PREFILL_TOKENS = 2048
"""About ten seconds on two cores for a model of 135M weights, while which nothing is decoded."""


@dataclass(frozen=True)
class Settings:
    """What `TorchSamplerEngine` is made with; see there."""

    base_model: str
    directory: str
    device: str
    dtype: str | None
    sequences: int
    context: int | None
    prefill_tokens: int | None
    cache_bytes: int | None
    decodes: bool


@dataclass(frozen=True)
class Built:
    """A loaded model, ready to generate."""

    forward: Forward
    generation: Generation
    limits: Limits
    end_of_sequence: frozenset[int]


def build(settings: Settings) -> Built:
    """Load and check the model. Raise `UserError` if it cannot be used or does not fit."""
    model = load_base(settings.directory, device=settings.device, dtype=settings.dtype)
    expected = plain_logits(model)
    forward = Forward(model, RowCache(CHECKED))
    verify(forward, expected)
    limits = _limits(settings, forward)
    prefill = settings.prefill_tokens or _PREFILL_TOKENS.get(forward.device.type, _SLOW_PREFILL_TOKENS)
    room = Room(settings.sequences, limits.positions, prefill)
    forward.cache = RowCache(room)
    return Built(forward, Generation(forward, room), limits, end_of_sequence(model))


def end_of_sequence(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids that end a sequence: of the generation settings or else of the model's, one, several or none."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = model.config.eos_token_id if ids is None else ids
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def _limits(settings: Settings, forward: Forward) -> Limits:
    """Find the limits once the cache has shown how many bytes a position takes."""
    available = settings.cache_bytes if settings.cache_bytes is not None else cache_bytes(forward.device)
    positions = available // forward.cache.position_bytes // BLOCK * BLOCK
    if not positions:
        raise UserError(
            f"cache_bytes {available} is too little: {BLOCK} positions of this model take "
            f"{BLOCK * forward.cache.position_bytes} bytes"
        )
    contexts = (forward.model.config.max_position_embeddings, settings.context, positions)
    return Limits(
        base_model=settings.base_model,
        vocabulary=forward.vocabulary,
        context=min(context for context in contexts if context is not None),
        sequences=settings.sequences,
        positions=positions,
        decodes=settings.decodes,
    )
