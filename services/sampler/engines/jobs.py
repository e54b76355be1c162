"""A request while it is generated (a job), and each of its sequences (rows)."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from services.sampler.engines.batching import Waiting, padded
from services.sampler.engines.drawing import stream_key
from services.sampler.engines.scoring import PromptScores
from services.sampler.engines.stops import StopRule
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import (
    EMPTY_LOGPROB,
    SampledSequence,
    SampleRequest,
    SampleResult,
    StopReason,
    TopLogprobs,
)

Deliver = Callable[[SampleResult | Exception], None]


@dataclass(eq=False)
class Job:
    """One request and what it has so far."""

    request: SampleRequest
    limit: int
    """New tokens of each sequence at most."""
    stop: StopRule
    deliver: Deliver
    """Called once, in the worker's thread, unless the job is cancelled before."""
    arrived: float = field(default_factory=perf_counter)
    started: float = 0.0
    closed: bool = False
    """Complete, failed or cancelled: its rows are to be freed."""
    scores: PromptScores = field(default_factory=PromptScores)
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.request.params.seed
        self.seed = secrets.randbits(64) if given is None else given

    @property
    def policy(self) -> PolicyRef | None:
        """The adapter's key in the bank; None: the base model."""
        return self.request.policy

    @property
    def model(self) -> str:
        """What computes it, in words."""
        return f"base model {self.request.base_model}" if self.policy is None else f"policy {self.policy}"

    @property
    def order(self) -> str:
        """Sorts jobs so that those of one policy stand together."""
        return "" if self.policy is None else str(self.policy)

    @property
    def length(self) -> int:
        """Positions that each row may need."""
        return padded(len(self.request.prompt) + self.limit)

    def waiting(self) -> Waiting:
        """What admission has to know."""
        rows = self.request.num_samples if self.limit else 0
        return Waiting(rows, len(self.request.prompt), self.length, self.request.isolated)

    def rows(self) -> list[Row]:
        """Make its sequences, without a token."""
        return [Row(self, index, stream_key(self.seed, index)) for index in range(self.waiting().rows)]

    def complete(self) -> bool:
        """Whether every sequence has ended."""
        return len(self.sequences) == self.waiting().rows

    def result(self) -> SampleResult:
        """The answer. Without new tokens to generate every sequence is empty."""
        width = self.request.topk_sample_logprobs
        top = TopLogprobs(width=width, ids=Int32s(), logprobs=Float32s()) if width else None
        empty = SampledSequence(tokens=Int32s(), logprobs=Float32s(), stop_reason="length", top=top)
        now = perf_counter()
        return SampleResult(
            request_id=self.request.request_id,
            sequences=[self.sequences.get(index, empty) for index in range(self.request.num_samples)],
            prompt_logprobs=self.scores.logprobs,
            top_prompt_logprobs=self.scores.top,
            target_logprobs=self.scores.targets,
            policy=self.policy,
            queue_seconds=self.started - self.arrived,
            seconds=now - self.started,
            note=self.request.note,
        )


@dataclass(eq=False)
class Row:
    """One sequence that is generated."""

    job: Job
    index: int
    key: int
    """Of its random stream."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def position(self) -> int:
        """Where its newest token goes in the cache, which so far holds everything before."""
        return len(self.job.request.prompt) + len(self.tokens) - 1

    def add_top(self, ids: list[int], logprobs: list[float]) -> None:
        """Append the likeliest tokens where the next token is drawn, likeliest first, of which there may be more."""
        width = self.job.request.topk_sample_logprobs
        missing = width - len(ids)
        self.top_ids += ids[:width] + [0] * missing
        self.top_logprobs += logprobs[:width] + [EMPTY_LOGPROB] * missing

    def add(self, token: int, logprob: float) -> None:
        """Append a drawn token and end the sequence if it is the last. A NaN is the caller's to notice."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.job.stop.ends(self.tokens):
            self._end("stop")
        elif len(self.tokens) == self.job.limit:
            self._end("length")

    def _end(self, reason: StopReason) -> None:
        self.ended = True
        self.job.sequences[self.index] = SampledSequence(
            tokens=Int32s(self.tokens), logprobs=Float32s(self.logprobs), stop_reason=reason, top=self._top()
        )

    def _top(self) -> TopLogprobs | None:
        width = self.job.request.topk_sample_logprobs
        if not width:
            return None
        return TopLogprobs(width=width, ids=Int32s(self.top_ids), logprobs=Float32s(self.top_logprobs))
