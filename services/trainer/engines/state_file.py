"""A run's state as one safetensors file: nothing in it can execute, and every tool can look inside.

The vectors `weights`, `mean`, `square` and, if one was gathered, `gradient` are fp32; the metadata say which layers
they belong to. Equal states give equal bytes.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from services.trainer.engines.adamw import Moments
from services.trainer.engines.run_state import RunState
from shared.contracts.policies import LoraSpec
from shared.errors import PermanentError
from shared.models.lora import Adapter

FORMAT = "openrl-mesh trainer state 2"


def write_state(state: RunState, base_model: str) -> bytes:
    """Return everything of a run, so that `read_state` continues bit for bit."""
    tensors = {"weights": state.weights, "mean": state.moments.mean, "square": state.moments.square}
    if state.gradient is not None:
        tensors["gradient"] = state.gradient
    about = {
        "format": FORMAT,
        "base_model": base_model,
        "step": state.step,
        "lora": msgspec.to_builtins(state.adapter.spec),
        "layers": _shapes(state.adapter),
    }
    # One entry only: safetensors writes several in any order, and the bytes are checksummed.
    metadata = {"openrl": json.dumps(about)}
    return safetensors.torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, metadata=metadata)


def read_state(data: bytes, base_model: str, model: nn.Module) -> RunState:
    """Return the run that `write_state` wrote. Raise `PermanentError` for damage or if it is of another model."""
    about, tensors = _open(data)
    if about.get("format") != FORMAT:
        raise PermanentError(f"the state has format {about.get('format')!r}, this trainer reads {FORMAT!r}")
    if about.get("base_model") != base_model:
        raise PermanentError(f"the state belongs to base model {about.get('base_model')!r}, here is {base_model!r}")
    try:
        spec = msgspec.convert(about["lora"], LoraSpec)
        layers, step = about["layers"], int(about["step"])
    except (KeyError, ValueError) as error:
        raise PermanentError(f"the state's metadata are damaged: {error}") from error
    adapter = Adapter.fresh(model, spec)
    if layers != _shapes(adapter):
        raise PermanentError(f"the state's layers have other names or shapes than those of {base_model!r} here")
    state = RunState(adapter)
    state.step = step
    _fill(state, tensors)
    return state


def _shapes(adapter: Adapter) -> dict[str, list[list[int]]]:
    return {path: [list(tensor.shape) for tensor in pair] for path, pair in adapter.weights.items()}


def _open(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return metadata and tensors. The reader of bytes gives no metadata, so they are cut from the header."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header.get("__metadata__", {}).get("openrl", "{}"))
    except (SafetensorError, ValueError) as error:
        raise PermanentError(f"the state is no intact safetensors file: {error}") from error
    return about if isinstance(about, dict) else {}, tensors


def _fill(state: RunState, tensors: dict[str, Tensor]) -> None:
    for name in ("weights", "mean", "square", *(["gradient"] if "gradient" in tensors else [])):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != state.weights.shape or tensor.dtype != torch.float32:
            raise PermanentError(f"the state's {name} is missing or not {len(state.weights)} numbers in float32")
        if not tensor.isfinite().all():
            raise PermanentError(f"the state's {name} holds numbers that are not finite")
    place = state.weights.device
    state.weights.copy_(tensors["weights"])
    state.moments = Moments(tensors["mean"].to(place), tensors["square"].to(place))
    state.gradient = tensors["gradient"].to(place) if "gradient" in tensors else None
