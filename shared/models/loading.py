"""Loads a frozen base model from a directory or by its hub name, and says clearly why one cannot be loaded."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from shared.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Values of `model_type` whose layers the adapters and the packed attention are tested with."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def load_base(directory: str | Path, *, device: str = "cpu", dtype: str | None = None) -> PreTrainedModel:
    """Load a causal language model for frozen use: evaluation mode, no weight requires a gradient.

    `directory` holds `config.json` and safetensors, or is a hub name. `dtype` is a key of `DTYPES`; None: bfloat16 on
    CUDA and float32 elsewhere (a CPU without bfloat16 units is slower with it). Attention is torch's SDPA, except for
    families whose scores are soft-capped, which SDPA cannot do.

    Raise `UserError` if the directory, its config or weights are missing, damaged or incomplete, for a family that is
    not supported, and for an unknown dtype.
    """
    chosen = _dtype(dtype, device)
    source = _source(directory)
    config = _config(source)
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    model = _weights(source, config, dtype=chosen, attn_implementation="eager" if softcapped else "sdpa")
    model.requires_grad_(requires_grad=False)
    model.eval()
    return model.to(device)


def load_shape(directory: str | Path) -> PreTrainedModel:
    """Make the model of a directory, or hub name, without weights: what layers it has, how large, and its settings.

    Its tensors are on torch's `meta` device and take no memory. Raise `UserError` as `load_base` does, as far as that
    can be known without reading weights.
    """
    source = _source(directory)
    config = _config(source)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with contextlib.suppress(OSError):  # the file is optional
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _dtype(name: str | None, device: str) -> torch.dtype:
    if name is None:
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _source(directory: str | Path) -> str:
    """Return the directory, or the hub name if there is no such directory and it can be one."""
    path = Path(directory).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model directory {path} has no config.json: it must hold a Hugging Face model")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"model directory {path} has no weights: it needs at least one .safetensors file")
        return str(path)
    if isinstance(directory, Path) or not _HUB_NAME.match(directory):
        raise UserError(f"model directory {path} does not exist")
    return directory


def _config(source: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model {source!r} has no readable configuration here or on the hub: {_first_line(error)}"
        ) from error
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model {source!r} is of the family {config.model_type!r}: only {', '.join(FAMILIES)} are supported"
        )
    return config


def _weights(source: str, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    try:
        # Only safetensors: reading anything else would unpickle files that somebody else wrote.
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights of model {source!r} cannot be read: {_first_line(error)}") from error
    if report["missing_keys"]:
        # transformers would only warn and fill them with random numbers
        missing = sorted(report["missing_keys"])
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"the weights of model {source!r} lack {missing[0]}{others}")
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
