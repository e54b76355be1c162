"""Tiny random models of every supported family, made on the spot: no network, no files in the repository.

The tokenizer has one token for each byte, whose id is the byte, so it renders any text and reads any ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # several threads only wait for each other over matrices this small

BYTES = 256
IM_START = 256
"""Id of `<|im_start|>`."""
IM_END = 257
"""Id of `<|im_end|>`, which ends a turn: the EOS."""
PAD = 258
VOCABULARY = 264
"""A little larger than the tokenizer's, as real models have it."""
CONTEXT = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What a family needs beyond the shape that all share. Windows are shorter than the tests' sequences, and
# Gemma's scores are scaled by another number than the head's size.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "head_dim": 8, "sliding_window": 16},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 5},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 5},
}


def make_tiny_model(
    directory: Path, *, seed: int = 0, family: str = "llama", tied: bool | None = None, **shape: Any
) -> Path:
    """Write config, safetensors and tokenizer into `directory`, which is made, and return it.

    `tied` says whether unembedding and embedding are one matrix; None: yes for the Gemma families, no for others.
    `shape` holds settings of the model's configuration that are to be others than here.
    Weights are larger than a fresh model's, so that logits of different positions differ visibly.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    ids = {"bos_token_id": None, "eos_token_id": IM_END, "pad_token_id": PAD}
    tie = family.startswith("gemma") if tied is None else tied
    settings = {**sizes, **heads, **ids, **FAMILIES[family], "tie_word_embeddings": tie, "initializer_range": 0.15}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings | shape), dtype=torch.float32)
    model.generation_config.eos_token_id = IM_END
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """Write the byte-level tokenizer with its ChatML template into `directory`."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_symbols(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def _byte_symbols() -> dict[str, int]:
    """Return the symbol that the byte-level tokenizer writes for each byte: itself, or for the rest one from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {symbol: ord(symbol) for symbol in alphabet if ord(symbol) < BYTES}
    others = (byte for byte in range(BYTES) if byte not in own.values())
    return own | dict(zip(alphabet[len(own) :], others, strict=True))
