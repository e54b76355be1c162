"""The sampler engine on PyTorch and transformers: any supported model, CPU or GPU, nothing to compile.

`generate` makes a job, posts it to the worker and waits for its future. The worker is one thread: it begins jobs,
decodes, and delivers results to the caller's event loop. Policies are read from their files in a helper thread while it
goes on, and leave between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from services.sampler.engines.base import EngineLoad
from services.sampler.engines.building import Built, Settings, build
from services.sampler.engines.forward import Forward
from services.sampler.engines.jobs import Job
from services.sampler.engines.limits import Limits
from services.sampler.engines.stops import Decode, stop_rule
from services.sampler.engines.worker import Worker
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult
from shared.errors import TemporaryError
from shared.models.adapter_files import from_peft

T = TypeVar("T")


@dataclass(frozen=True)
class _Started:
    """What there is between `start` and the end."""

    built: Built
    worker: Worker
    loop: asyncio.AbstractEventLoop


class TorchSamplerEngine:
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
        max_context: int | None = None,
        prefill_tokens: int | None = None,
        cache_bytes: int | None = None,
        threads: int | None = None,
        decode: Decode | None = None,
    ) -> None:
        """Take the settings; nothing is loaded before `start`.

        `base_model` is the name that requests use, `directory` where the model lies (or its hub name), `dtype` as in
        `load_base`. `max_sequences` are generated at the same time, others wait. `max_context`: tokens of a prompt and
        its sample together; None: what the model was made for. `prefill_tokens`: prompt tokens computed between two
        decoding steps; None: 8192 on a GPU and 2048 on a CPU. `cache_bytes`: memory for keys and values at most; None:
        half of a host's available memory, 70 % of a GPU's. `threads`: CPU threads of one operation; None: torch's
        choice. `decode` turns ids into text; None: requests with stop strings are refused.
        """
        self._settings = Settings(
            base_model=base_model,
            directory=directory,
            device=device,
            dtype=dtype,
            sequences=max_sequences,
            context=max_context,
            prefill_tokens=prefill_tokens,
            cache_bytes=cache_bytes,
            decodes=decode is not None,
        )
        self._max_policies, self._threads, self._decode = max_policies, threads, decode
        self._policies: frozenset[PolicyRef] = frozenset()
        self._changing = asyncio.Lock()  # of start, stop and the policies
        self._pending: set[asyncio.Future[Any]] = set()
        self._started: _Started | None = None
        self._death: BaseException | None = None

    @property
    def base_model(self) -> str:
        """Name under which requests ask for this model."""
        return self._settings.base_model

    @property
    def policies(self) -> frozenset[PolicyRef]:
        """Policies that are loaded."""
        return self._policies

    @property
    def capacity(self) -> int:
        """How many policies can be loaded at the same time."""
        return self._max_policies

    @property
    def limits(self) -> Limits:
        """What can be answered. Raise `TemporaryError` if the engine is not running."""
        return self._alive().built.limits

    def problem(self) -> str | None:
        """See `SamplerEngine.problem`."""
        return None if self._death is None else f"the worker has died: {self._death!r}"

    def load(self) -> EngineLoad:
        """How busy the engine was at the end of its last step."""
        return EngineLoad() if self._started is None else self._started.worker.load

    def check(self, request: SampleRequest) -> None:
        """Raise `UserError` for a request that can never be answered, also for a policy that is not loaded."""
        self.limits.check(request, self._policies)

    async def start(self) -> None:
        """Load the base model and begin. Once started, starting again is harmless.

        Raise `UserError` if the model cannot be used.
        """
        async with self._changing:
            if self._started is not None:
                return
            built = await asyncio.to_thread(build, self._settings)
            loop = asyncio.get_running_loop()
            name = f"sampler {self.base_model}"
            worker = Worker(built.generation, name=name, threads=self._threads, on_death=partial(self._report, loop))
            worker.start()
            self._started, self._death = _Started(built, worker, loop), None

    async def load_policy(self, policy: PolicyRef, files: Mapping[str, bytes]) -> None:
        """Make a policy ready from PEFT's files (name to content) while requests go on. Twice is harmless.

        Raise `PermanentError` if the files do not fit the base model, `TemporaryError` while `capacity` policies are
        loaded.
        """
        async with self._changing:
            if policy in self._policies:
                return
            if len(self._policies) >= self._max_policies:
                raise TemporaryError(f"{self._max_policies} policies are loaded, which is all that fit: unload one")
            await asyncio.to_thread(_add, self._alive().built.forward, policy, files)
            self._alive()
            self._policies |= {policy}

    async def unload_policy(self, policy: PolicyRef) -> None:
        """Free a policy's memory. Raise `TemporaryError` while a request uses it; an unknown one is ignored."""
        async with self._changing:
            if policy not in self._policies:
                return
            self._policies -= {policy}  # at once, so that no new request names it
            if users := await self._in_worker(partial(self._remove, policy)):
                self._policies |= {policy}
                raise TemporaryError(f"policy {policy} is used by {users} requests: unload it when they have ended")

    async def generate(self, request: SampleRequest) -> SampleResult:
        """Answer a request. Cancelling the caller frees the request's place before the next step.

        Raise as `check` does; `PermanentError` if the policy's numbers overflow; `TemporaryError` if memory ran out or
        the worker has died. When the engine is stopped, the caller is cancelled.
        """
        self.check(request)
        started = self._alive()
        future: asyncio.Future[SampleResult] = started.loop.create_future()
        job = Job(
            request=request,
            limit=started.built.limits.new_tokens(request),
            stop=stop_rule(request.params.stop, started.built.end_of_sequence, self._decode),
            deliver=partial(_deliver, started.loop, future),
        )
        started.worker.post(partial(started.built.generation.submit, job))
        try:
            return await self._answer(future)
        except asyncio.CancelledError:
            started.worker.post(partial(started.built.generation.cancel, job))
            raise

    async def stop(self) -> None:
        """End; requests still running are cancelled. Idempotent."""
        async with self._changing:
            started, self._started = self._started, None
            self._policies = frozenset()
            for future in self._pending:
                future.cancel()
            if started is not None:
                await asyncio.to_thread(started.worker.stop)

    def _alive(self) -> _Started:
        if self._death is not None:
            raise TemporaryError(f"the sampler's worker has died, restart it: {self._death!r}") from self._death
        if self._started is None:
            raise TemporaryError("the sampler engine is not running")
        return self._started

    async def _in_worker(self, action: Callable[[], T]) -> T:
        """Run `action` between two steps and return what it returns, or raise what it raises."""
        started = self._alive()
        future: asyncio.Future[T] = started.loop.create_future()
        started.worker.post(partial(_run, action, partial(_deliver, started.loop, future)))
        return await self._answer(future)

    async def _answer(self, future: asyncio.Future[T]) -> T:
        self._pending.add(future)
        try:
            return await future
        finally:
            self._pending.discard(future)

    def _remove(self, policy: PolicyRef) -> int:
        """Take a policy out of the bank unless requests use it; return how many do. Runs in the worker's thread."""
        built = self._alive().built
        users = built.generation.uses(policy)
        if not users:
            built.forward.bank.remove(policy)
        return users

    def _report(self, loop: asyncio.AbstractEventLoop, error: BaseException) -> None:
        """Tell everybody that waits that the worker has died. Runs in the worker's thread."""
        _call(loop, self._die, error)

    def _die(self, error: BaseException) -> None:
        self._death = error
        for future in self._pending:
            if not future.done():
                future.set_exception(TemporaryError(f"the sampler's worker has died, restart it: {error!r}"))


def _add(forward: Forward, policy: PolicyRef, files: Mapping[str, bytes]) -> None:
    """Read a policy and put it into the bank: one more entry, which no step that is under way looks for."""
    forward.bank.add(policy, from_peft(files, forward.model))


def _run(action: Callable[[], T], deliver: Callable[[T | Exception], None]) -> None:
    try:
        outcome: T | Exception = action()
    except Exception as error:
        outcome = error
    deliver(outcome)


def _deliver(loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], outcome: T | Exception) -> None:
    _call(loop, _resolve, future, outcome)


def _resolve(future: asyncio.Future[T], outcome: T | Exception) -> None:
    if future.done():  # cancelled meanwhile
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Call a function in the loop's thread; without a loop nobody waits any more."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)
