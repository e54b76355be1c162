"""Models by name, in their real shapes, with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bf16, from NVIDIA's data sheets, by what the device's name contains."""

PEAK_BYTES = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes a second to and from the device's memory, from NVIDIA's data sheets (SXM)."""


@dataclass(frozen=True)
class Shape:
    """A model's dimensions."""

    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    context: int = 8192

    def model(self, device: str, dtype: torch.dtype) -> PreTrainedModel:
        """Return the model with random weights, frozen."""
        config = AutoConfig.for_model(
            self.family,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.context,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.requires_grad_(False).eval()

    @property
    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with, the unembedding included."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp) + self.hidden * self.vocabulary

    def decode_bytes(self, sequences: int, context: float, size: int) -> float:
        """Bytes that one decoding step must read, with `size` bytes a number: the least that any engine moves.

        Every weight that tokens are multiplied with, once for all sequences; and for each of these the keys and values
        of `context` positions, 2 * layers * kv_heads * head_dim numbers each. Writing the new ones, activations and
        logits are left out.
        """
        position = 2 * self.layers * self.kv_heads * self.head_dim
        return size * (self.matmul_parameters + sequences * context * position)

    def flops_per_token(self, sequence: int) -> float:
        """Operations of a forward and backward pass over frozen weights, with causal attention.

        Two for each weight forward and two for the gradient of its input; attention takes 2 * 2 * seq / 2 forward and
        twice that backward for each of heads * head_dim.
        """
        return 4 * self.matmul_parameters + 6 * self.layers * self.heads * self.head_dim * sequence


SHAPES = {
    "smollm2-135m": Shape("llama", 576, 1536, 30, 9, 3, 64, 49152, tied=True),
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, tied=True),
    "llama-3-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "small": Shape("llama", 64, 128, 2, 4, 2, 16, 512, tied=True),
}
