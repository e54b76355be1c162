"""One request while vLLM generates it: a sequence of vLLM's for each sample, and the answer made of what they say."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

from services.sampler.engines.drawing import stream_key
from services.sampler.engines.scoring import wants_scores
from services.sampler.engines.stops import StopRule
from services.sampler.engines.vllm_core import Adapter, VllmCore
from services.sampler.engines.vllm_wire import (
    DRAWING,
    SCORING,
    Columns,
    PromptScores,
    drawing_arguments,
    drawn,
    flat_rows,
    prompt_scores,
)
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.sampling import EMPTY_LOGPROB, SampledSequence, SampleRequest, SampleResult, TopLogprobs
from shared.errors import PermanentError

T = TypeVar("T")
Count = Callable[[int, int], None]
"""Told of prompt tokens and of sampled tokens that were computed."""


@dataclass
class _Sample:
    """A sequence that grows."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    def result(self, width: int) -> SampledSequence:
        top = TopLogprobs(width=width, ids=Int32s(self.top_ids), logprobs=Float32s(self.top_logprobs))
        return SampledSequence(
            tokens=Int32s(self.tokens),
            logprobs=Float32s(self.logprobs),
            stop_reason="stop" if self.stopped else "length",
            top=top if width else None,
        )


class Generation:
    """Generates one request."""

    def __init__(
        self,
        core: VllmCore,
        request: SampleRequest,
        *,
        adapter: Adapter | None,
        limit: int,
        stop: StopRule,
        count: Count,
    ) -> None:
        """`limit`: new tokens of each sequence at most; 0: the prompt is only scored."""
        self._core, self._request, self._adapter = core, request, adapter
        self._limit, self._stop, self._count = limit, stop, count
        self._columns = Columns.of(request, core.vocabulary) if wants_scores(request) else None
        self._scores = PromptScores()
        given = request.params.seed
        self._seed = secrets.randbits(64) if given is None else given

    async def run(self, arrived: float) -> SampleResult:
        """The answer. Cancelling it, or an error of one sequence, ends all of them in vLLM too."""
        started, request = perf_counter(), self._request
        begun = await self._begin(request.num_samples if self._limit else 1)
        samples = await _together([self._follow(index, each) for index, each in enumerate(begun)])
        width = request.topk_sample_logprobs
        if not self._limit:
            samples = [_Sample() for _ in range(request.num_samples)]
        return SampleResult(
            request_id=request.request_id,
            sequences=[sample.result(width) for sample in samples],
            prompt_logprobs=self._scores.logprobs,
            top_prompt_logprobs=self._scores.top,
            target_logprobs=self._scores.targets,
            policy=request.policy,
            queue_seconds=started - arrived,
            seconds=perf_counter() - started,
        )

    async def _begin(self, sequences: int) -> list[Any]:
        """Hand all sequences to vLLM; those of an isolated request so that every run makes the same batches."""
        isolated = self._request.isolated
        salt = secrets.token_hex(8) if isolated else None  # what others have cached has others' last bits
        begun: list[Any] = []
        try:
            async with self._core.held() if isolated else contextlib.nullcontext():
                for index in range(sequences):
                    params = self._params(index)
                    begun += [await self._core.begin(self._request.prompt, params, self._adapter, salt)]
        except BaseException:
            for each in begun:
                await self._core.abort(each)
            raise
        return begun

    def _params(self, index: int) -> Any:
        from vllm import SamplingParams  # noqa: PLC0415 - only where vLLM is
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        request, width = self._request, self._request.topk_sample_logprobs
        extra = {DRAWING: drawing_arguments(request.params, stream_key(self._seed, index), width)}
        columns = self._columns if index == 0 else None
        if columns is not None:
            extra[SCORING] = columns.arguments(request)
        return SamplingParams(
            temperature=0.0,  # see `vllm_wire`
            max_tokens=max(self._limit, 1),
            ignore_eos=True,
            stop_token_ids=sorted(self._stop.ids),
            logprobs=min(width + 1, self._core.vocabulary) if width else 0,
            prompt_logprobs=None if columns is None else columns.count,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if self._stop.strings else RequestOutputKind.FINAL_ONLY,
            extra_args=extra,
        )

    async def _follow(self, index: int, begun: Any) -> _Sample:
        sample, first = _Sample(), True
        async with contextlib.aclosing(self._core.outputs(begun)) as outputs:
            async for output in outputs:
                if first:
                    self._begun(index, output)
                    first = False
                if self._limit:
                    self._add(sample, output.outputs[0])
                if sample.stopped:
                    break
        return sample

    def _begun(self, index: int, output: Any) -> None:
        """Note what is said once: how much of the prompt was computed, and its scores."""
        request = self._request
        self._count(len(request.prompt) - (output.num_cached_tokens or 0), 0)
        if index or self._columns is None:
            return
        try:
            rows = flat_rows(output.prompt_logprobs, len(request.prompt) - 1)
            self._scores = prompt_scores(request, self._columns, rows)
        except ArithmeticError as error:
            raise self._overflow() from error

    def _add(self, sample: _Sample, said: Any) -> None:
        """Append new tokens, up to the one that ends the sample."""
        width = self._request.topk_sample_logprobs
        rows = flat_rows(said.logprobs, len(said.token_ids))
        if not width and not self._stop.strings:  # most requests; a sample of thousands of tokens comes at once
            self._add_plain(sample, said, rows.values)
            return
        for token, (ids, values) in zip(said.token_ids, rows, strict=True):
            logprob, best, best_logprobs = drawn(ids, values, width)
            if math.isnan(logprob):
                raise self._overflow()
            sample.tokens.append(token)
            sample.logprobs.append(logprob)
            sample.top_ids += best + [0] * (width - len(best))
            sample.top_logprobs += best_logprobs + [EMPTY_LOGPROB] * (width - len(best))
            self._count(0, 1)
            if self._stop.strings and self._stop.ends(sample.tokens):
                sample.stopped = True
                return
        sample.stopped = said.finish_reason == "stop"

    def _add_plain(self, sample: _Sample, said: Any, values: Sequence[float]) -> None:
        """Append new tokens, all of which stay, each with its one number."""
        logprobs = [-value for value in values]
        if not all(map(math.isfinite, logprobs)):
            raise self._overflow()
        sample.tokens += said.token_ids
        sample.logprobs += logprobs
        sample.stopped = said.finish_reason == "stop"
        self._count(0, len(logprobs))

    def _overflow(self) -> PermanentError:
        request = self._request
        model = f"base model {request.base_model}" if request.policy is None else f"policy {request.policy}"
        return PermanentError(f"{model} gives logits that are not finite")


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all at once. The first error, or being cancelled, cancels the rest, and is raised when that has ended."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
