"""The sampler engine on vLLM: for GPUs, and for CPUs with the same code.

Requests wait here, owners in turn, until there are places for all of their sequences; what has begun is vLLM's to
batch. vLLM computes the model and keeps the cache. Tokens are drawn and prompts scored by our own code in its worker
(see `vllm_wire`), so that a request means the same on every engine.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Mapping
from time import perf_counter
from typing import Any, TypeVar

from services.sampler.engines.base import EngineLoad
from services.sampler.engines.limits import Limits
from services.sampler.engines.stops import Decode, stop_rule
from services.sampler.engines.vllm_core import Adapter, VllmCore
from services.sampler.engines.vllm_generation import Generation
from services.sampler.engines.vllm_places import Places
from services.sampler.engines.vllm_setup import VllmSettings, room_for
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult
from shared.errors import PermanentError, TemporaryError
from shared.models.adapter_files import from_peft

T = TypeVar("T")


class VllmSamplerEngine:
    """A `SamplerEngine`. All methods are called from one event loop, the one that `start` ran in."""

    def __init__(
        self,
        base_model: str,
        directory: str,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        max_sequences: int = 128,
        max_policies: int = 8,
        max_rank: int = 32,
        max_context: int | None = None,
        prefill_tokens: int | None = None,
        cache_bytes: int | None = None,
        memory_share: float = 0.5,
        threads: int | None = None,
        eager: bool | None = None,
        decode: Decode | None = None,
        core: VllmCore | None = None,
    ) -> None:
        """Take the settings; nothing is loaded before `start`.

        Those that `TorchSamplerEngine` has too mean the same; `prefill_tokens` None: vLLM's choice. `max_rank`: highest
        rank of a policy; each takes as much memory as if it had it. `memory_share`: part of a GPU's memory for weights,
        policies and cache together; `cache_bytes`: for the cache alone, instead; None on a CPU: a quarter of the
        available memory, 4 GiB at most. `eager`: neither compile nor capture CUDA graphs, which starts sooner and
        generates slower; None: only on a CPU. `core`: one that runs already and goes on after `stop`; then settings
        that concern it are its own.

        Raise `UserError` for a `max_rank` that cannot be.
        """
        self._base_model, self._context, self._decode = base_model, max_context, decode
        self._settings = VllmSettings(
            directory=directory,
            device=device,
            dtype=dtype,
            sequences=max_sequences,
            policies=max_policies,
            rank=room_for(max_rank),
            prefill_tokens=prefill_tokens,
            cache_bytes=cache_bytes,
            memory_share=memory_share,
            threads=threads,
            eager=eager,
        )
        self._shared = core
        self._core: VllmCore | None = None
        self._limits: Limits | None = None
        self._adapters: dict[PolicyRef, Adapter] = {}
        self._users: Counter[PolicyRef] = Counter()
        self._changing = asyncio.Lock()  # of start, stop and the policies
        self._places = Places(max_sequences)
        self._work: set[asyncio.Task[Any]] = set()
        self._prompt_tokens = self._sampled_tokens = 0

    @property
    def base_model(self) -> str:
        """Name under which requests ask for this model."""
        return self._base_model

    @property
    def policies(self) -> frozenset[PolicyRef]:
        """Policies that are loaded."""
        return frozenset(self._adapters)

    @property
    def capacity(self) -> int:
        """How many policies can be loaded at the same time."""
        return self._settings.policies

    def problem(self) -> str | None:
        """See `SamplerEngine.problem`."""
        return None if self._core is None else self._core.problem()

    def load(self) -> EngineLoad:
        """How busy the engine is now; of what vLLM itself lets wait, at its last step."""
        running = self._places.running
        inside = min(running, self._core.queue.waiting) if self._core is not None else 0
        return EngineLoad(
            running=running - inside,
            waiting=self._places.waiting + inside,
            prompt_tokens=self._prompt_tokens,
            sampled_tokens=self._sampled_tokens,
        )

    def check(self, request: SampleRequest) -> None:
        """Raise `UserError` for a request that can never be answered, also for a policy that is not loaded."""
        self._alive()
        assert self._limits is not None
        self._limits.check(request, self._adapters.keys())

    async def start(self) -> None:
        """Load the base model and begin. Once started, starting again is harmless.

        Raise `UserError` if the model or the device cannot be used, or vLLM is not installed.
        """
        async with self._changing:
            if self._core is not None:
                return
            core = self._shared or await VllmCore.start(self._settings, self._context)
            self._limits = Limits(
                base_model=self._base_model,
                vocabulary=core.vocabulary,
                context=min(core.context, self._context or core.context),
                sequences=self._settings.sequences,
                positions=core.positions,
                decodes=self._decode is not None,
            )
            self._core = core

    async def load_policy(self, policy: PolicyRef, files: Mapping[str, bytes]) -> None:
        """Make a policy ready from PEFT's files (name to content) while requests go on. Twice is harmless.

        Raise `PermanentError` if the files do not fit the base model or the rank is too high, `TemporaryError` while
        `capacity` policies are loaded.
        """
        async with self._changing:
            core = self._alive()
            if policy in self._adapters:
                return
            if len(self._adapters) >= self.capacity:
                raise TemporaryError(f"{self.capacity} policies are loaded, which is all that fit: unload one")
            found = await asyncio.to_thread(from_peft, files, core.shape)
            if found.spec.rank > self._settings.rank:
                raise PermanentError(
                    f"policy {policy} has rank {found.spec.rank}: this sampler has room for {self._settings.rank}; "
                    f"start it with max_rank {found.spec.rank}, or train with a lower rank"
                )
            self._adapters[policy] = await core.add_adapter(str(policy), files)

    async def unload_policy(self, policy: PolicyRef) -> None:
        """Free a policy's memory. Raise `TemporaryError` while a request uses it; an unknown one is ignored."""
        async with self._changing:
            if policy not in self._adapters:
                return
            if users := self._users[policy]:
                raise TemporaryError(f"policy {policy} is used by {users} requests: unload it when they have ended")
            await self._alive().remove_adapter(self._adapters.pop(policy))

    async def generate(self, request: SampleRequest) -> SampleResult:
        """Answer a request. Cancelling the caller frees the request's places at vLLM's next step.

        Raise as `check` does; `PermanentError` if the policy's numbers overflow; `TemporaryError` if vLLM has died.
        When the engine is stopped, the caller is cancelled.
        """
        self.check(request)
        return await self._doing(self._answer(self._alive(), request))

    async def stop(self) -> None:
        """End, vLLM's processes too; requests still running are cancelled. Idempotent."""
        async with self._changing:
            core, self._core = self._core, None
            for work in self._work:
                work.cancel()
            await asyncio.gather(*self._work, return_exceptions=True)
            if core is not None:
                for adapter in self._adapters.values():
                    await core.remove_adapter(adapter)
            self._adapters.clear()
            if core is not None and core is not self._shared:
                await core.stop()

    async def _answer(self, core: VllmCore, request: SampleRequest) -> SampleResult:
        assert self._limits is not None
        arrived, limit, policy = perf_counter(), self._limits.new_tokens(request), request.policy
        generation = Generation(
            core,
            request,
            adapter=None if policy is None else self._adapters[policy],
            limit=limit,
            stop=stop_rule(request.params.stop, core.end_of_sequence, self._decode),
            count=self._count,
        )
        rows = request.num_samples if limit else 1
        cost = len(request.prompt) + rows * limit
        if policy is not None:
            self._users[policy] += 1
        try:
            async with self._places.taken(rows, owner=request.owner, cost=cost, isolated=request.isolated):
                return await generation.run(arrived)
        finally:
            if policy is not None:
                self._users[policy] -= 1

    async def _doing(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it in a way that `stop` can cancel."""
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return await task

    def _count(self, prompt_tokens: int, sampled_tokens: int) -> None:
        self._prompt_tokens += prompt_tokens
        self._sampled_tokens += sampled_tokens

    def _alive(self) -> VllmCore:
        if self._core is None:
            raise TemporaryError("the sampler engine is not running")
        if (problem := self._core.problem()) is not None:
            raise TemporaryError(f"{problem}: restart the sampler")
        return self._core
