"""Makes the engine that a configuration asks for."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from services.trainer.config import TrainerConfig
from services.trainer.engines.base import TrainerEngine
from services.trainer.engines.fused.layers import FusedOptions
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.models.loading import load_base

LAUNCH_BOUND = 2_000_000_000
"""Parameters below which a pass is a matter of launching kernels."""


def make_engine(config: TrainerConfig) -> TrainerEngine:
    """Load the base model and return the engine. Raise `UserError` if the model cannot be used."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    model = load_base(config.model_dir, device=device)
    return TorchTrainerEngine(
        config.base_model,
        model,
        max_pass_tokens=config.max_pass_tokens,
        fused=fused_options(model) if model.device.type == "cuda" else None,
    )


def fused_options(model: PreTrainedModel) -> FusedOptions:
    """Return how a GPU runs the layers: compiled, and captured if launching their kernels would take longest."""
    return FusedOptions(compile=True, graphs=model.num_parameters() < LAUNCH_BOUND)
