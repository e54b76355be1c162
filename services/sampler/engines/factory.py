"""Makes the engine that a configuration asks for."""

from __future__ import annotations

from services.sampler.config import SamplerConfig
from services.sampler.engines.base import SamplerEngine
from services.sampler.engines.torch_engine import TorchSamplerEngine
from shared.models.devices import usable
from shared.text import chat_tokenizer


def make_engine(config: SamplerConfig) -> SamplerEngine:
    """An engine that is not started. Raise `UserError` if there is no such device or no usable tokenizer."""
    device = usable(config.device)
    return TorchSamplerEngine(
        config.base_model,
        config.model_dir,
        device=device,
        max_sequences=config.max_sequences,
        max_policies=config.max_policies,
        threads=config.threads or None,
        decode=chat_tokenizer(config.model_dir).decoder,
    )
