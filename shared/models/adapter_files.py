"""Adapters as PEFT's two files, so that every tool that reads PEFT reads ours, and the other way round."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from shared.contracts.policies import MAX_RANK, LoraSpec
from shared.errors import PermanentError
from shared.models.lora import ATTENTION, MLP, UNEMBED, Adapter, linear_layers

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<matrix>[AB])\.weight$")

# Settings of PEFT that change what the weights mean, with the only value that we can follow.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
}
_EMPTY = ("rank_pattern", "alpha_pattern", "layer_replication", "target_parameters", "trainable_token_indices")


def to_peft(adapter: Adapter, base_model_name: str) -> dict[str, bytes]:
    """Return `adapter_config.json` and `adapter_model.safetensors` (fp32) by name."""
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in adapter.weights.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.detach().float().cpu().contiguous()
    alpha = adapter.spec.alpha
    config = _PLAIN | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": adapter.spec.rank,
        # PEFT and vLLM declare an integer, though both compute with any number
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in adapter.weights}),
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    return {CONFIG: text.encode(), WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"})}


def from_peft(files: Mapping[str, bytes], model: nn.Module) -> Adapter:
    """Read an adapter for `model`, in fp32 on its device.

    Raise `PermanentError` naming what is wrong: a missing or unreadable file, a variant of LoRA that is not plain, a
    module that the model lacks, one matrix without the other, a shape that does not fit, numbers that are not finite.
    """
    config = _config(files)
    layers = linear_layers(model, ATTENTION + MLP + UNEMBED)
    matrices = _matrices(files)
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    for path in (known for known in layers if known in matrices):
        weights[path] = _pair(path, matrices.pop(path), layers[path], config["r"])
    if matrices:
        raise PermanentError(f"{WEIGHTS} adapts {next(iter(matrices))}, which is no linear layer of this base model")
    if not weights:
        raise PermanentError(f"{WEIGHTS} holds no adapter weights")
    return Adapter(_spec(config, weights), weights)


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise PermanentError(f"the adapter has no {name}: it has {', '.join(sorted(files)) or 'no files'}")
    return files[name]


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        config = json.loads(_file(files, CONFIG))
    except ValueError as error:
        raise PermanentError(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise PermanentError(f"{CONFIG} is not a JSON object")
    for name, wanted in _PLAIN.items():
        if (config.get(name, wanted) or wanted) != wanted:
            raise PermanentError(f"{CONFIG} has {name} {config[name]!r}: only {wanted!r} is supported")
    for name in _EMPTY:
        if config.get(name):
            raise PermanentError(f"{CONFIG} has {name} {config[name]!r}: it is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise PermanentError(f"{CONFIG} has r {rank!r}: it must be an integer from 1 to {MAX_RANK}")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        raise PermanentError(f"{CONFIG} has lora_alpha {alpha!r}: it must be a positive number")
    return config


def _matrices(files: Mapping[str, bytes]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by module path, then by "A" or "B"."""
    try:
        tensors = safetensors.torch.load(_file(files, WEIGHTS))
    except SafetensorError as error:
        raise PermanentError(f"{WEIGHTS} is damaged: {error}") from error
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise PermanentError(f"{WEIGHTS} has an entry {key!r}: only lora_A and lora_B weights are known")
        matrices.setdefault(match["path"], {})[match["matrix"]] = tensor
    return matrices


def _pair(path: str, matrices: dict[str, Tensor], layer: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
    wanted = {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
    for name, shape in wanted.items():
        if name not in matrices:
            raise PermanentError(f"{WEIGHTS} has no lora_{name} for {path}")
        if tuple(matrices[name].shape) != shape:
            raise PermanentError(f"lora_{name} of {path} is {list(matrices[name].shape)}: it must be {list(shape)}")
        if not _is_finite(matrices[name]):
            raise PermanentError(f"lora_{name} of {path} holds numbers that are not finite")
    a, b = (matrices[name].to(layer.weight.device).float() for name in "AB")
    return a, b


def _is_finite(matrix: Tensor) -> bool:
    # A sum is finite only if all its terms are, and takes a tenth of the time of looking at each.
    return bool(matrix.sum().isfinite()) or bool(matrix.isfinite().all())


def _spec(config: dict[str, Any], weights: Mapping[str, object]) -> LoraSpec:
    names = {path.rpartition(".")[2] for path in weights}
    return LoraSpec(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        train_attn=not names.isdisjoint(ATTENTION),
        train_mlp=not names.isdisjoint(MLP),
        train_unembed=not names.isdisjoint(UNEMBED),
    )
