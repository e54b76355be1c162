"""A run's state as one safetensors file: nothing in it can execute, and every tool can look inside.

The vectors `weights`, `mean`, `square` and, if one was gathered, `gradient` are fp32; the metadata say which layers
they belong to. Equal states give equal bytes.
"""

from __future__ import annotations

import json
import math

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from services.trainer.engines.adamw import Moments
from services.trainer.engines.run_state import RunState
from shared.contracts.policies import LoraSpec
from shared.errors import PermanentError, UserError
from shared.models.lora import Adapter, linear_layers, target_names

FORMAT = "openrl-mesh trainer state 2"


class _About(msgspec.Struct, frozen=True):
    """What the metadata say."""

    format: str
    base_model: str
    step: int
    lora: LoraSpec
    layers: dict[str, list[list[int]]]
    """Shapes of A and B by path."""


def write_state(state: RunState, base_model: str) -> bytes:
    """Return everything of a run, so that `read_state` continues bit for bit."""
    tensors = {"weights": state.weights, "mean": state.moments.mean, "square": state.moments.square}
    if state.gradient is not None:
        tensors["gradient"] = state.gradient
    about = _About(
        format=FORMAT,
        base_model=base_model,
        step=state.step,
        lora=state.adapter.spec,
        layers=_shapes(state.adapter),
    )
    return _write({name: tensor.cpu() for name, tensor in tensors.items()}, about)


def read_state(data: bytes, base_model: str, model: nn.Module) -> RunState:
    """Return the run that `write_state` wrote. Raise `PermanentError` for damage or if it is of another model."""
    about, tensors = _open(data, base_model)
    state = RunState(Adapter.fresh(model, about.lora))
    if about.layers != _shapes(state.adapter):
        raise PermanentError(f"the state's layers have other names or shapes than those of {base_model!r} here")
    _check(tensors, len(state.weights))
    state.step = about.step
    _fill(state, tensors)
    return state


def begun_from(data: bytes, base_model: str, model: nn.Module, lora: LoraSpec, *, optimizer: bool) -> bytes:
    """Return the state of a run that begins with the weights that `write_state` wrote, and no gathered gradient.

    With `optimizer`, also with its moments and steps. Computes on the CPU and changes nothing. Raise `UserError` if
    the state's adapter has another shape than `lora`, `PermanentError` as `read_state` does.
    """
    about, tensors = _open(data, base_model)
    if msgspec.structs.replace(about.lora, seed=lora.seed) != lora:
        raise UserError(
            f"the checkpoint's adapter is {_words(about.lora)}, the run's is {_words(lora)}: use one like it"
        )
    if about.layers != _expected_shapes(model, about.lora):
        raise PermanentError(f"the state's layers have other names or shapes than those of {base_model!r} here")
    _check(tensors, sum(math.prod(shape) for pair in about.layers.values() for shape in pair))
    begun = {"weights": tensors["weights"]}
    for name in ("mean", "square"):
        begun[name] = tensors[name] if optimizer else torch.zeros_like(tensors["weights"])
    return _write(begun, msgspec.structs.replace(about, lora=lora, step=about.step if optimizer else 0))


def _shapes(adapter: Adapter) -> dict[str, list[list[int]]]:
    return {path: [list(tensor.shape) for tensor in pair] for path, pair in adapter.weights.items()}


def _expected_shapes(model: nn.Module, lora: LoraSpec) -> dict[str, list[list[int]]]:
    layers = linear_layers(model, target_names(lora))
    return {path: [[lora.rank, it.in_features], [it.out_features, lora.rank]] for path, it in layers.items()}


def _words(lora: LoraSpec) -> str:
    parts = [name for name in ("attn", "mlp", "unembed") if getattr(lora, f"train_{name}")]
    return f"of rank {lora.rank} and alpha {lora.alpha:g} on {', '.join(parts)}"


def _write(tensors: dict[str, Tensor], about: _About) -> bytes:
    # One entry only: safetensors writes several in any order, and the bytes are checksummed.
    return safetensors.torch.save(tensors, metadata={"openrl": json.dumps(msgspec.to_builtins(about))})


def _open(data: bytes, base_model: str) -> tuple[_About, dict[str, Tensor]]:
    """Return metadata and tensors. The reader of bytes gives no metadata, so they are cut from the header."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found = json.loads(header.get("__metadata__", {}).get("openrl", "{}"))
    except (SafetensorError, ValueError) as error:
        raise PermanentError(f"the state is no intact safetensors file: {error}") from error
    about = found if isinstance(found, dict) else {}
    if about.get("format") != FORMAT:
        raise PermanentError(f"the state has format {about.get('format')!r}, this trainer reads {FORMAT!r}")
    if about.get("base_model") != base_model:
        raise PermanentError(f"the state belongs to base model {about.get('base_model')!r}, here is {base_model!r}")
    try:
        return msgspec.convert(about, _About), tensors
    except msgspec.ValidationError as error:
        raise PermanentError(f"the state's metadata are damaged: {error}") from error


def _check(tensors: dict[str, Tensor], size: int) -> None:
    for name in ("weights", "mean", "square", *(["gradient"] if "gradient" in tensors else [])):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != (size,) or tensor.dtype != torch.float32:
            raise PermanentError(f"the state's {name} is missing or not {size} numbers in float32")
        if not tensor.isfinite().all():
            raise PermanentError(f"the state's {name} holds numbers that are not finite")


def _fill(state: RunState, tensors: dict[str, Tensor]) -> None:
    place = state.weights.device
    state.weights.copy_(tensors["weights"])
    state.moments = Moments(tensors["mean"].to(place), tensors["square"].to(place))
    state.gradient = tensors["gradient"].to(place) if "gradient" in tensors else None
