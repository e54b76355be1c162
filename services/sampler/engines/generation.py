"""Continuous batching: requests begin as soon as there is room, and every step gives one token to each sequence.

Everything here runs in one thread and knows no event loop. `begin` computes each waiting request's prompt, once however
many samples it has; `decode` computes one token for all rows. A request whose prompt or end fails, fails alone; a
failure of a decoding step ends all requests that take part in it. Either way the next ones are served.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor

from services.sampler.engines.base import EngineLoad
from services.sampler.engines.batches import Batch, Watched, drawing_of, integers, segments
from services.sampler.engines.batching import Room, Running, Shape, admit, compaction, padded, prefill_groups
from services.sampler.engines.drawing import draw, uniforms
from services.sampler.engines.fair import FairQueue
from services.sampler.engines.forward import Forward
from services.sampler.engines.jobs import Job, Row
from services.sampler.engines.kv_cache import PrefillStep
from services.sampler.engines.scoring import score_prompt, wants_scores
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SampleResult
from shared.errors import PermanentError, TemporaryError

log = logging.getLogger(__name__)


_PASSES_TOGETHER = 4
"""Passes over prompts, each as large as may come between two decoding steps, after which none is put off any more."""


class Generation:
    """Jobs that wait and jobs that run."""

    def __init__(self, forward: Forward, room: Room) -> None:
        self._forward = forward
        self._room = room
        self._waiting: FairQueue[Job] = FairQueue(owner=_owner, cost=_promised)
        self._rows: list[Row] = []  # in the order of the cache
        self._batch: Batch | None = None  # None: rows have come or gone since the last step
        self._outbox: list[tuple[Job, SampleResult | Exception]] = []
        self._begun_together = 0
        """Passes over prompts since nothing ran, without a decoding step; 0 once there was one."""
        self._prompt_tokens = 0
        self._sampled_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._rows)

    def load(self) -> EngineLoad:
        """How busy it is."""
        waiting = sum(job.request.num_samples for job in self._waiting)
        # As `batching.admit` counts: rows times the longest row's positions.
        positions = len(self._rows) * max((row.job.length for row in self._rows), default=0)
        kv_cache = min(1.0, positions / max(1, self._room.positions))
        return EngineLoad(len(self._rows), waiting, self._prompt_tokens, self._sampled_tokens, kv_cache)

    def uses(self, policy: PolicyRef) -> int:
        """Count the requests that wait or run and name `policy`."""
        return len({id(job) for job in (*self._waiting, *(row.job for row in self._rows)) if job.policy == policy})

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn."""
        self._waiting.add(job)

    def cancel(self, job: Job) -> None:
        """Forget a job and free its rows. One that has ended is ignored."""
        job.closed = True
        self._waiting.remove(job)
        self._retire()

    def deliver(self) -> None:
        """Hand out what has become known. Not earlier, so that whoever gets an answer finds its rows freed."""
        outbox, self._outbox = self._outbox, []
        for job, outcome in outbox:
            job.deliver(outcome)

    def begin(self) -> None:
        """Begin the requests that there is room for, up to the first token of each of their samples."""
        together = self._begun_together if self._rows else 0
        first_of_all = bool(together or not self._rows)
        self._begun_together = 0
        if not self._waiting:
            return
        length = max((row.job.length for row in self._rows), default=0)
        running = Running(len(self._rows), length, any(row.job.request.isolated for row in self._rows))
        first = list(islice(self._waiting.in_turn(), self._room.rows))
        jobs = first[: admit([job.waiting() for job in first], running, self._room)]
        self._waiting.take(jobs)
        if jobs and self._waiting and first_of_all and together < _PASSES_TOGETHER - 1:
            self._begun_together = together + 1
        for job in jobs:
            job.started = perf_counter()
        for group in prefill_groups([len(job.request.prompt) for job in jobs], self._room.prompt_tokens):
            self._start(sorted((jobs[index] for index in group), key=lambda job: job.order))

    def decode(self) -> None:
        """Give every row its next token. Put off while requests that came together begin, to go on with all of them."""
        if not self._rows or self._begun_together:
            return
        try:
            batch = self._batch = self._batch or Batch.of(self._rows, self._forward.vocabulary, self._forward.device)
            self._reserve(len(self._rows), batch.longest)
            logits = self._forward.decode(batch.tokens, batch.step(), batch.segments)
            if batch.watched is not None:
                batch.watched.look(logits)
            tokens, logprobs = draw(logits, batch.drawing, batch.numbers())
            drawn = tokens.tolist(), logprobs.tolist()
        except Exception as error:
            self._fail_running(error)
            return
        batch.advance(tokens)
        self._record(batch.rows, *drawn)

    def _start(self, jobs: Sequence[Job]) -> None:
        """Compute prompts together. If that fails, each is tried alone, so that only the one at fault fails."""
        try:
            rows = [row for job in jobs for row in job.rows()]
            hidden = self._prefill(jobs, rows)
            self._score_prompts(jobs, hidden)
            drawn = self._first_tokens(jobs, rows, hidden) if rows else ([], [])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._start([job])
            else:
                self._close(jobs[0], _failure(jobs[0], "computing the prompt", error))
            return
        self._prompt_tokens += sum(len(job.request.prompt) for job in jobs)
        self._rows += rows
        self._batch = None
        self._record(rows, *drawn)
        for job in jobs:
            if not job.limit:
                self._close(job, job.result())

    def _prefill(self, jobs: Sequence[Job], rows: Sequence[Row]) -> Tensor:
        """Run prompts, filled up to the longest, and store them in new rows; return hidden states [b, T, hidden]."""
        longest = max(len(job.request.prompt) for job in jobs)
        ids = [[*job.request.prompt, *([0] * (longest - len(job.request.prompt)))] for job in jobs]
        if rows:
            self._reserve(len(self._rows) + len(rows), longest, max(job.length for job in jobs))
        place = {id(job): index for index, job in enumerate(jobs)}
        device = self._forward.device
        step = PrefillStep(len(self._rows), integers((place[id(row.job)] for row in rows), device))
        return self._forward.prefill(torch.tensor(ids, device=device), step, segments(jobs))

    def _score_prompts(self, jobs: Sequence[Job], hidden: Tensor) -> None:
        for index, job in enumerate(jobs):
            if wants_scores(job.request):
                self._score_prompt(job, hidden[index, : len(job.request.prompt)])

    def _score_prompt(self, job: Job, hidden: Tensor) -> None:
        forward = self._forward
        try:
            job.scores = score_prompt(
                job.request, hidden, lambda some: forward.logits(some, [(job.policy, 0, len(some))]), forward.vocabulary
            )
        except ArithmeticError as error:
            raise PermanentError(f"{job.model} gives {error}") from None

    def _first_tokens(self, jobs: Sequence[Job], rows: Sequence[Row], hidden: Tensor) -> tuple[list[int], list[float]]:
        """Draw the first token of every row from its prompt's last hidden state, through the head once a prompt."""
        device = self._forward.device
        sampled = [index for index, job in enumerate(jobs) if job.limit]
        ends = integers((len(jobs[index].request.prompt) - 1 for index in sampled), device)
        last = hidden[integers(sampled, device), ends]
        logits = self._forward.logits(last, segments(jobs[index] for index in sampled))
        place = {id(jobs[index]): at for at, index in enumerate(sampled)}
        keys = integers((row.key for row in rows), device)
        numbers = uniforms(keys, torch.zeros_like(keys))
        source = integers((place[id(row.job)] for row in rows), device)
        logits = logits[source]
        if (watched := Watched.of(rows, self._forward.vocabulary, device)) is not None:
            watched.look(logits)
        tokens, logprobs = draw(logits, drawing_of(rows, device), numbers)
        return tokens.tolist(), logprobs.tolist()

    def _reserve(self, rows: int, length: int, promised: int = 0) -> None:
        need, cache = Shape(rows, padded(length)), self._forward.cache
        if need.rows <= cache.shape.rows and need.length <= cache.shape.length:
            return
        promised = max(promised, need.length, *(row.job.length for row in self._rows))
        used = Shape(len(self._rows), max((row.position for row in self._rows), default=0))
        cache.reserve(need, promised, used)

    def _record(self, rows: Sequence[Row], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Append the drawn tokens, close what is complete, free what has ended."""
        self._sampled_tokens += len(rows)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            try:
                if logprob != logprob:
                    raise PermanentError(f"{row.job.model} gives logits that are not finite")
                row.add(token, logprob)
            except Exception as error:
                self._close(row.job, _failure(row.job, "deciding whether a sample ends", error))
            if row.ended and row.job.complete():
                self._close(row.job, row.job.result())
        if any(row.ended or row.job.closed for row in rows):
            self._retire()

    def _retire(self) -> None:
        """Free the rows that have ended, and move the last ones into their places."""
        ended = [row.ended or row.job.closed for row in self._rows]
        if not any(ended):
            return
        cache = self._forward.cache
        cache.wipe([slot for slot, row in enumerate(self._rows) if row.job.closed and not row.ended])
        movers, holes = compaction(ended)
        cache.move(movers, holes, max((self._rows[slot].position for slot in movers), default=0))
        for mover, hole in zip(movers, holes, strict=True):
            self._rows[hole] = self._rows[mover]
        del self._rows[len(ended) - sum(ended) :]
        self._batch = None

    def _fail_running(self, error: Exception) -> None:
        for job in {id(row.job): row.job for row in self._rows}.values():
            self._close(job, _failure(job, "computing the next tokens", error))
        self._retire()

    def _close(self, job: Job, outcome: SampleResult | Exception) -> None:
        if not job.closed:
            job.closed = True
            self._outbox.append((job, outcome))


def _owner(job: Job) -> str:
    return job.request.owner


def _promised(job: Job) -> int:
    """Tokens that a job may take: what it is charged with, since that is what it is admitted with."""
    return len(job.request.prompt) + job.limit * job.request.num_samples


def _failure(job: Job, doing: str, error: Exception) -> Exception:
    """Put a failure into words for whoever asked, and into the log unless it is the request's own."""
    if isinstance(error, PermanentError):
        return error
    # The engine's thread has no context: the line is given the ids of the request.
    policy = job.request.policy
    ids = {"run": policy.run, "policy": policy} if policy else {}
    log.error("%s failed", doing, exc_info=error, extra={"request": job.request.request_id, **ids})
    if isinstance(error, torch.OutOfMemoryError):
        return TemporaryError(f"the sampler ran out of memory while {doing}: {str(error).splitlines()[0]}")
    failure = RuntimeError(f"the sampler failed while {doing}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
