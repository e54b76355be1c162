"""The rows being generated as tensors: what one decoding step needs, made again only when rows come or go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from services.sampler.engines.batching import padded
from services.sampler.engines.drawing import Drawing, likeliest, temperature_of, uniforms
from services.sampler.engines.jobs import Job, Row
from services.sampler.engines.kv_cache import DecodeStep
from shared.contracts.policies import PolicyRef

PolicySegment = tuple[PolicyRef | None, int, int]


def segments(jobs: Iterable[Job]) -> list[PolicySegment]:
    """Return the runs of equal policies: policy, first, one behind the last."""
    found: list[PolicySegment] = []
    start = 0
    for policy, group in groupby(job.policy for job in jobs):
        stop = start + sum(1 for _ in group)
        found.append((policy, start, stop))
        start = stop
    return found


@dataclass(frozen=True)
class Watched:
    """The rows whose likeliest tokens are asked for."""

    rows: Sequence[Row]
    places: Tensor
    """[m]: where they are in the batch."""
    temperatures: Tensor
    """[m, 1]"""
    count: int

    @classmethod
    def of(cls, rows: Sequence[Row], vocabulary: int, device: torch.device) -> Watched | None:
        """Find them. None: nobody asks."""
        places = [place for place, row in enumerate(rows) if row.job.request.topk_sample_logprobs]
        if not places:
            return None
        watched = [rows[place] for place in places]
        scales = [temperature_of(row.job.request.params) for row in watched]
        count = max(row.job.request.topk_sample_logprobs for row in watched)
        return cls(
            watched, integers(places, device), torch.tensor(scales, device=device)[:, None], min(count, vocabulary)
        )

    def look(self, logits: Tensor) -> None:
        """Note the likeliest tokens of logits [n, V], before those are overwritten."""
        ids, logprobs = likeliest(logits[self.places], self.count, self.temperatures)
        for row, some_ids, some_logprobs in zip(self.rows, ids.tolist(), logprobs.tolist(), strict=True):
            row.add_top(some_ids, some_logprobs)


def drawing_of(rows: Sequence[Row], device: torch.device) -> Drawing:
    """Gather how rows are drawn."""
    return Drawing.of([row.job.request.params for row in rows], device)


def integers(values: Iterable[int], device: torch.device) -> Tensor:
    """Return them as int64 on the device."""
    return torch.tensor(list(values), dtype=torch.int64, device=device)


@dataclass
class Batch:
    """All rows, grouped by policy so that each adapter multiplies one range of the batch."""

    rows: list[Row]
    segments: list[PolicySegment]
    drawing: Drawing
    watched: Watched | None
    slots: Tensor
    """[n]: the row of the cache of each row of the batch."""
    batch_of_slot: Tensor | None
    """[n]: the inverse of `slots`; None if both orders are the same."""
    tokens: Tensor
    """[n]: the newest token of each row, which the next step computes."""
    positions: Tensor
    slot_positions: Tensor
    keys: Tensor
    counts: Tensor
    """[n]: number of the token that is drawn next, from 0."""
    longest: int
    """Positions that the longest row will have after the next step."""

    @classmethod
    def of(cls, active: Sequence[Row], vocabulary: int, device: torch.device) -> Batch:
        """Gather rows that stand in the order of the cache and have at least one token each."""
        order = sorted(range(len(active)), key=lambda slot: active[slot].job.order)
        rows = [active[slot] for slot in order]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return cls(
            rows=rows,
            segments=segments(row.job for row in rows),
            drawing=drawing_of(rows, device),
            watched=Watched.of(rows, vocabulary, device),
            slots=integers(order, device),
            batch_of_slot=None if order == inverse == sorted(order) else integers(inverse, device),
            tokens=integers((row.tokens[-1] for row in rows), device),
            positions=integers((row.position for row in rows), device),
            slot_positions=integers((row.position for row in active), device),
            keys=integers((row.key for row in rows), device),
            counts=integers((len(row.tokens) for row in rows), device),
            longest=max(row.position for row in rows) + 1,
        )

    def step(self) -> DecodeStep:
        """Say what the next forward pass does with the cache."""
        return DecodeStep(self.slots, self.positions, self.slot_positions, padded(self.longest), self.batch_of_slot)

    def numbers(self) -> Tensor:
        """Return the uniform number [n] that each row's next token is drawn with."""
        return uniforms(self.keys, self.counts)

    def advance(self, tokens: Tensor) -> None:
        """Go on with the drawn tokens [n], none of which has ended its row."""
        self.tokens = tokens
        self.longest += 1
        self.positions += 1
        self.slot_positions += 1
        self.counts += 1
