"""vLLM's engine as the sampler's engine needs it: started, its adapters by number, sequences generated, ended.

All that knows `AsyncLLM` is here. Several sampler engines may share a core, as the tests do, since it takes a while to
start.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from services.sampler.engines.building import end_of_sequence
from services.sampler.engines.vllm_setup import VllmSettings, engine_arguments, require_vllm, set_environment
from shared.errors import PermanentError, TemporaryError, UserError
from shared.models.loading import load_shape

STOP_SECONDS = 5.0
"""What vLLM's processes may take to end, before they are killed."""


@dataclass(frozen=True)
class Adapter:
    """A policy that vLLM has loaded."""

    number: int
    """Never used again, so that neither it nor the prompts cached for it are taken for another's."""
    request: Any
    """vLLM's `LoRARequest`."""
    folder: tempfile.TemporaryDirectory[str]
    """Its files. vLLM reads them when it loads it; they stay as long as it might want them again."""


class Queue:
    """What vLLM says of its own queue at each step; given to it as a logger of statistics."""

    def __init__(self) -> None:
        self.waiting = 0
        """Sequences for which its cache has no room now."""

    def record(self, scheduler_stats: Any, *_: object, **__: object) -> None:
        """Keep what is needed."""
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say."""

    def record_sleep_state(self, *_: object, **__: object) -> None:
        """It never sleeps."""


class VllmCore:
    """A started engine of vLLM's, in processes of its own."""

    def __init__(self, llm: Any, shape: PreTrainedModel, settings: VllmSettings, queue: Queue) -> None:
        """`start` makes it."""
        self.settings = settings
        self.shape = shape
        """The model's layers without their weights."""
        self.queue = queue
        self.end_of_sequence = end_of_sequence(shape)
        self.vocabulary: int = shape.get_input_embeddings().num_embeddings
        """Ids are below this."""
        self.context = int(llm.model_config.max_model_len) - 1
        """Tokens of a prompt and its sample together."""
        cache = llm.vllm_config.cache_config
        self.block = int(cache.block_size)
        """Tokens that are cached, and shared by sequences, together."""
        self.positions = int(cache.num_gpu_blocks) * self.block
        """Tokens that fit into the cache."""
        self._llm = llm
        self._numbers, self._names = count(1), count()

    @classmethod
    async def start(cls, settings: VllmSettings, context: int | None = None) -> VllmCore:
        """Start it; the loop stays free. `context`: tokens of a prompt and its sample; None: what the model has.

        Raise `UserError` if the model or the device cannot be used.
        """
        require_vllm()
        return await asyncio.to_thread(_start, settings, context)

    def problem(self) -> str | None:
        """Why it cannot answer any more; None: it can."""
        return "vLLM's engine has died; what it wrote before says why" if self._llm.errored else None

    async def add_adapter(self, name: str, files: Mapping[str, bytes]) -> Adapter:
        """Load a policy from PEFT's files, which have been checked, while sequences are generated."""
        from vllm.lora.request import LoRARequest  # noqa: PLC0415 - only where vLLM is

        number = next(self._numbers)
        folder = tempfile.TemporaryDirectory(prefix="openrl-policy-")
        try:
            await asyncio.to_thread(_write, Path(folder.name), files)
            request = LoRARequest(f"{name}#{number}", number, folder.name)
            await self._llm.add_lora(request)
        except Exception as error:
            folder.cleanup()
            if self.problem():
                raise TemporaryError(str(self.problem())) from error
            raise PermanentError(f"vLLM cannot load policy {name}: {error}") from error
        return Adapter(number, request, folder)

    async def remove_adapter(self, adapter: Adapter) -> None:
        """Free its memory and delete its files."""
        try:
            await self._llm.remove_lora(adapter.number)
        finally:
            adapter.folder.cleanup()

    async def begin(self, prompt: Sequence[int], params: Any, adapter: Adapter | None, salt: str | None) -> Any:
        """Hand a sequence to vLLM; the result is for `outputs`. Prompts are shared only with those of the same salt."""
        given: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if salt is not None:
            given["cache_salt"] = salt
        lora = None if adapter is None else adapter.request
        return await self._llm.add_request(f"sequence-{next(self._names)}", given, params, lora_request=lora)

    async def outputs(self, begun: Any) -> AsyncGenerator[Any, None]:
        """What vLLM says of a sequence. Whoever stops listening before its end frees its place at once.

        Raise `TemporaryError` if the engine has died.
        """
        finished = False
        try:
            while not finished:
                output = begun.get_nowait() or await begun.get()
                finished = output.finished
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            finished = True
            if (problem := self.problem()) is None:
                raise
            raise TemporaryError(problem) from error
        finally:
            if not finished:
                await self.abort(begun)

    async def abort(self, begun: Any) -> None:
        """Free a sequence's place."""
        await self._llm.abort(begun.request_id, internal=True)

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Sequences that begin inside the block are computed only after it, and from one step on."""
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            yield
        finally:
            await self._llm.resume_generation()

    async def stop(self) -> None:
        """End vLLM's processes. Idempotent."""
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # it would take the end that is wanted for a failure, and log it
        await asyncio.to_thread(self._llm.shutdown, timeout=STOP_SECONDS)
        # Its finalizer calls this again, at the end of the interpreter too, where it fails and says so.
        self._llm.shutdown = lambda timeout=None: None


def _start(settings: VllmSettings, context: int | None) -> VllmCore:
    """Start a core. Blocks for a while, so it has a thread of its own."""
    shape = load_shape(settings.directory)
    set_environment(settings)
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - seconds, and only where vLLM is
    from vllm.platforms import current_platform  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    _check_platform(settings, current_platform)
    own = int(shape.config.max_position_embeddings)
    arguments = engine_arguments(settings, min(own, context or own))
    queue = Queue()
    try:
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments, disable_log_stats=True), stat_loggers=[lambda *_: queue]
        )
    except Exception as error:
        raise UserError(
            f"vLLM cannot serve {settings.directory}: {str(error).strip().splitlines()[-1]} (its own lines above say "
            "more; engine 'torch' may serve it)"
        ) from error
    return VllmCore(llm, shape, settings, queue)


def _check_platform(settings: VllmSettings, platform: Any) -> None:
    built = "cpu" if platform.is_cpu() else "cuda"
    if settings.device.partition(":")[0] != built:
        raise UserError(
            f"device {settings.device!r}: the vLLM that is installed here is for {built}; choose device {built!r}, "
            "engine 'torch', or another environment"
        )


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
