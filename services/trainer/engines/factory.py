"""Makes the engine that a configuration asks for."""

from __future__ import annotations

import torch

from services.trainer.config import TrainerConfig
from services.trainer.engines.base import TrainerEngine
from services.trainer.engines.fused.layers import ON_GPU
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.models.devices import usable
from shared.models.loading import load_base


def make_engine(config: TrainerConfig) -> TrainerEngine:
    """Load the base model and return the engine. Raise `UserError` if the model or the device cannot be used."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = usable(config.device)
    model = load_base(config.model_dir, device=device)
    return TorchTrainerEngine(
        config.base_model,
        model,
        max_pass_tokens=config.max_pass_tokens,
        fused=ON_GPU if model.device.type == "cuda" else None,
    )
