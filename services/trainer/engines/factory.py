"""Makes the engine that a configuration asks for."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sysconfig

import torch

from services.trainer.config import TrainerConfig
from services.trainer.engines.base import TrainerEngine
from services.trainer.engines.fused.layers import FusedOptions
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.models.devices import usable

log = logging.getLogger(__name__)


def make_engine(config: TrainerConfig) -> TrainerEngine:
    """Load the base model and return the engine. Raise `UserError` if the model or the device cannot be used."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = usable(config.device)
    return TorchTrainerEngine(
        config.base_model,
        config.model_dir,
        device=device,
        max_pass_tokens=config.max_pass_tokens,
        fused=fused_options(device, config.recompute_tokens),
    )


def fused_options(device: str, recompute_rows: int | None = None) -> FusedOptions | None:
    """Return how the layers run on a device; None: by the model's own modules.

    On a GPU they are compiled and captured: launching kernels from Python takes longer than running them, even those of
    large models.
    """
    cuda = device.startswith("cuda")
    if not cuda and recompute_rows is None:
        return None
    return FusedOptions(compile=cuda and _can_compile(), graphs=cuda, recompute_rows=recompute_rows)


def _can_compile() -> bool:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    able = importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang", compiler)))
    if not able:
        log.warning("layers run uncompiled, which is slower: compiling needs triton and a C compiler such as gcc")
    return able
