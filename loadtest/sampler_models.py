"""Models and policies to measure samplers with: real shapes, random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from loadtest.shapes import SHAPES
from shared import topology
from shared.bus import Bus
from shared.contracts.policies import LoraSpec, PolicyRecord, PolicyRef
from shared.models.adapter_files import to_peft
from shared.models.lora import Adapter, linear_layers, target_names

SPEC = LoraSpec(rank=16)


def model_directory(shape: str, directory: Path, device: str) -> Path:
    """Write a model of a shape into a folder of `directory`, unless it is there, and return the folder."""
    path = directory / shape
    if not (path / "tokenizer.json").exists():
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        SHAPES[shape].model(device, dtype).save_pretrained(path)
        _save_tokenizer(path)
    return path


def _save_tokenizer(path: Path) -> None:
    """Write a tokenizer of bytes with a chat template, which samplers want to have; the tests ask with token ids."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(path)


def adapter_files(model_dir: str, seed: int) -> dict[str, bytes]:
    """Return PEFT's files of an adapter of random weights, of a size that changes little."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        path: (
            torch.randn(SPEC.rank, layer.in_features, generator=generator).mul_(0.02),
            torch.randn(layer.out_features, SPEC.rank, generator=generator).mul_(0.02),
        )
        for path, layer in linear_layers(model, target_names(SPEC)).items()
    }
    return to_peft(Adapter(SPEC, weights), model_dir)


async def publish_policy(bus: Bus, base_model: str, run: str, files: dict[str, bytes]) -> PolicyRef:
    """Put a policy where samplers find it, as a trainer does, without announcing it."""
    config = await bus.blobs.put(f"policies/{run}/adapter_config.json", files["adapter_config.json"])
    weights = await bus.blobs.put(f"policies/{run}/adapter_model.safetensors", files["adapter_model.safetensors"])
    policy = PolicyRef(run=run, version=1)
    record = PolicyRecord(policy=policy, base_model=base_model, lora=SPEC, config=config, weights=weights)
    await bus.table(topology.POLICIES).create((run, "1"), record)
    return policy
