"""Configuration of a sampler."""

from __future__ import annotations

from typing import Literal

from shared.config import ServiceConfig


class SamplerConfig(ServiceConfig, frozen=True, kw_only=True):
    """One sampler serves one base model."""

    base_model: str
    """Name under which requests ask for it."""
    model_dir: str
    """Directory with its files, or a name on the Hugging Face hub."""
    engine: Literal["torch", "vllm"] = "torch"
    """`torch` runs wherever PyTorch does; `vllm` needs vLLM, and the `vllm:` settings below are for it alone."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto`: a GPU if there is one."""
    max_sequences: int = 128
    """Sequences generated at the same time; more wait."""
    max_policies: int = 8
    """Policies in memory at the same time; the least recently used one goes first."""
    max_requests: int = 512
    """Requests taken from the queue at the same time; the rest stays there for other replicas."""
    threads: int = 0
    """CPU threads of the engine. 0: as many as cores."""
    max_rank: int = 32
    """vLLM: the highest rank of a policy, up to 128. Each takes as much memory and time as if it had it."""
    memory_share: float = 0.5
    """vLLM: part of a GPU's memory that weights, policies and cache take together. The rest is a trainer's."""
    eager: bool = False
    """vLLM on a GPU: neither compile nor capture CUDA graphs. Starts minutes sooner and generates slower."""
