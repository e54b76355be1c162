"""Makes the engine that a configuration asks for."""

from __future__ import annotations

import torch

from services.trainer.config import TrainerConfig
from services.trainer.engines.base import TrainerEngine
from services.trainer.engines.torch_engine import TorchTrainerEngine


def make_engine(config: TrainerConfig) -> TrainerEngine:
    """Load the base model and return the engine. Raise `UserError` if the model cannot be used."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return TorchTrainerEngine(
        config.base_model, config.model_dir, device=device, max_pass_tokens=config.max_pass_tokens
    )
