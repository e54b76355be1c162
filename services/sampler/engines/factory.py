"""Makes the engine that a configuration asks for."""

from __future__ import annotations

from services.sampler.config import SamplerConfig
from services.sampler.engines.base import SamplerEngine
from services.sampler.engines.torch_engine import TorchSamplerEngine
from services.sampler.engines.vllm_engine import VllmSamplerEngine
from services.sampler.engines.vllm_setup import require_vllm
from shared.errors import UserError
from shared.models.devices import usable
from shared.text import chat_tokenizer


def make_engine(config: SamplerConfig) -> SamplerEngine:
    """An engine that is not started.

    Raise `UserError` if there is no such device, no vLLM where it is asked for, or no usable tokenizer.
    """
    device = usable(config.device)
    if config.engine == "vllm":
        return _vllm(config, device)
    return TorchSamplerEngine(
        config.base_model,
        config.model_dir,
        device=device,
        max_sequences=config.max_sequences,
        max_policies=config.max_policies,
        threads=config.threads or None,
        decode=chat_tokenizer(config.model_dir).decoder,
    )


def _vllm(config: SamplerConfig, device: str) -> VllmSamplerEngine:
    require_vllm()
    if not 0 < config.memory_share < 1:
        raise UserError(f"memory_share {config.memory_share}: it must be more than 0 and less than 1")
    return VllmSamplerEngine(
        config.base_model,
        config.model_dir,
        device=device,
        max_sequences=config.max_sequences,
        max_policies=config.max_policies,
        max_rank=config.max_rank,
        memory_share=config.memory_share,
        eager=config.eager or None,
        threads=config.threads or None,
        decode=chat_tokenizer(config.model_dir).decoder,
    )
