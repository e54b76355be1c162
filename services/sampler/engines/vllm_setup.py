"""What vLLM is told at its start: environment and arguments. Importing this module does not import vLLM."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import psutil

from shared.contracts.policies import MAX_RANK
from shared.contracts.sampling import MAX_WIDTH
from shared.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128)
"""Highest ranks that vLLM can make room for, as far as a policy's may go."""
CPU_BLOCK = 32
"""Tokens of one block of the cache. vLLM's kernels for CPUs want a multiple of 32; its own choice of 128 would share
only prompts longer than that."""
_CPU_SHARE, _CPU_MOST = 0.25, 4 << 30
"""Of a host's available memory for the cache, which vLLM takes at once and keeps."""

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Whatever it is: no server of ours but on loopback. vLLM otherwise binds to the address that leads outside.
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings at every start are a dozen, and none is for operators
    "TQDM_DISABLE": "1",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # a worker has nothing to save; on a CPU it ends only when told twice
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # The engine's other runner knows neither of the two hooks in the way that vLLM 0.24 and 0.32 have in common.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # One position more than the model has, which no token is computed at: scoring a full context takes one new token.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
CPU_ENVIRONMENT = {
    # A trainer shares the cores; bound to one of them each, both would wait for the other.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    # vLLM's adapters on CPUs make tensors of hundreds of megabytes and drop them again. Taken from the system each
    # time, their pages cost more than the arithmetic.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}


@dataclass(frozen=True)
class VllmSettings:
    """What a core is started with; see `VllmSamplerEngine`."""

    directory: str
    device: str = "cpu"
    dtype: str | None = None
    sequences: int = 128
    policies: int = 8
    rank: int = 32
    prefill_tokens: int | None = None
    cache_bytes: int | None = None
    memory_share: float = 0.5
    threads: int | None = None
    eager: bool | None = None


def installed() -> bool:
    """Whether vLLM is there, without the seconds that importing it takes."""
    return importlib.util.find_spec("vllm") is not None


def require_vllm() -> None:
    """Raise `UserError` if vLLM is not there."""
    if not installed():
        raise UserError(
            "engine 'vllm' needs vLLM, which is not installed here: `make vllm` installs it for CPUs, "
            "pip install 'openrl-mesh[vllm]' for GPUs; or choose engine 'torch'"
        )


def room_for(wanted: int) -> int:
    """The least rank that vLLM can make room for and that is at least `wanted`. Raise `UserError` for none."""
    if not 1 <= wanted <= MAX_RANK:
        raise UserError(f"max_rank {wanted}: it goes from 1 to {MAX_RANK}")
    return next(rank for rank in RANKS if rank >= wanted)


def set_environment(settings: VllmSettings) -> None:
    """Set what vLLM, and the processes that it starts, read from the environment. What is set already stays.

    Must come before vLLM is imported.
    """
    # The one place outside of `shared.config` that touches the environment: vLLM has no other way to be told.
    own = dict(ENVIRONMENT) | (CPU_ENVIRONMENT if settings.device == "cpu" else {})
    if settings.threads:
        own["OMP_NUM_THREADS"] = str(settings.threads)
    for name, value in own.items():
        os.environ.setdefault(name, value)
    if numbered := re.fullmatch(r"cuda:(\d+)", settings.device):
        visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(numbered[1])] if visible else numbered[1]


def engine_arguments(settings: VllmSettings, context: int) -> dict[str, Any]:
    """Arguments of `AsyncEngineArgs`. `context`: tokens of prompt and sample together."""
    package = __name__.rpartition(".")[0]
    cpu = settings.device == "cpu"
    dtype = settings.dtype or ("float32" if cpu else "bfloat16")
    return {
        "model": settings.directory,
        "dtype": dtype,
        "load_format": "safetensors",  # no pickle
        "skip_tokenizer_init": True,  # prompts and samples are token ids
        "generation_config": "vllm",  # no defaults of the model's for what a request leaves open
        "max_model_len": context + 1,
        "max_num_seqs": settings.sequences,
        "max_num_batched_tokens": settings.prefill_tokens,
        "block_size": CPU_BLOCK if cpu else None,
        "kv_cache_memory_bytes": settings.cache_bytes or (_cpu_cache() if cpu else None),
        "gpu_memory_utilization": settings.memory_share,
        "enable_prefix_caching": True,
        "enforce_eager": cpu if settings.eager is None else settings.eager,
        "enable_lora": True,
        "max_loras": settings.policies,
        "max_cpu_loras": settings.policies,  # all that are loaded have a slot, so none is ever swapped
        "max_lora_rank": room_for(settings.rank),
        # Samples are drawn by `vllm_drawing`, prompts scored by `vllm_worker`; this carries their numbers unchanged.
        "logits_processors": [f"{package}.vllm_drawing:Drawer"],
        "logprobs_mode": "processed_logits",
        "max_logprobs": 2 * MAX_WIDTH + 1,
        "worker_cls": f"{package}.vllm_worker.SamplerWorker",
        "additional_config": {"sampler_pid": os.getpid()},
        "seed": 0,
        "enable_log_requests": False,
    }


def _cpu_cache() -> int:
    return min(int(psutil.virtual_memory().available * _CPU_SHARE), _CPU_MOST)
