"""Whole passes as CUDA graphs: one launch instead of thousands.

A graph has fixed shapes and addresses. Passes are therefore filled up to sizes of a coarse grid with a document of its
own, whose gradient is zero; it goes with the rows of the last run and changes nothing. Two graphs belong together, one
for each direction. All share one memory pool, since a pass is over before the next begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from services.trainer.engines.fused.layer import Rows
from services.trainer.engines.fused.stacks import Stacks
from shared.models.varlen import Documents

log = logging.getLogger(__name__)

MOST = 24
"""Captured passes kept at a time."""

Compute = Callable[[Tensor, Rows], Tensor]


class _Key(NamedTuple):
    rows: int
    keys: int
    documents: int
    longest: int
    places: int
    rank: int
    backward: bool


def roomy(count: int) -> int:
    """Return the power of two from `count` on: so that there are few different shapes."""
    return 1 << max(0, count - 1).bit_length()


def rounded(rows: int) -> int:
    """Return the size that a pass of `rows` rows is filled up to: multiples of 1,024, four between powers of two.

    Each size is compiled when it first comes, so there should be few; scheduled passes are near their budget anyway.
    """
    step = max(1024, roomy(rows) // 8)
    return -(-rows // step) * step


class Graphs:
    """Captures each shape of a pass when it first comes, and replays it from then on."""

    def __init__(self) -> None:
        self._captured: dict[_Key, _Captured] = {}
        self._pool: Any = None

    def run(
        self, compute: Compute, x: Tensor, rows: Rows, stacks: Stacks, *, backward: bool
    ) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
        """Return hidden states [rows, hidden] and what leads back from their gradient to that of the stacks."""
        filled_x, filled = _filled(x, rows)
        docs = filled.documents
        keys = 0 if docs.keys is None else len(docs.keys)
        shape = (len(filled_x), keys, len(docs.query_ends), docs.longest_key)
        key = _Key(*shape, stacks.places, stacks.rank, backward)
        captured = self._captured.get(key) or self._capture(key, compute, filled_x, filled, stacks)
        return captured.run(filled_x, filled, len(x))

    def _capture(self, key: _Key, compute: Compute, x: Tensor, rows: Rows, stacks: Stacks) -> _Captured:
        if len(self._captured) >= MOST:
            self._captured.clear()
            self._pool = None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        log.info("capturing a pass of %d rows", key.rows)
        self._captured[key] = _Captured(compute, x, rows, stacks, self._pool, backward=key.backward)
        return self._captured[key]


class _Captured:
    """One shape: static inputs, a graph there, a graph back."""

    def __init__(self, compute: Compute, x: Tensor, rows: Rows, stacks: Stacks, pool: Any, *, backward: bool) -> None:
        self._x, self._rows = x.clone(), _cloned(rows)
        self._forth, self._back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._gradient = torch.zeros_like(x)
        leaves = stacks.tensors
        self._warm_up(compute, leaves, backward=backward)
        with torch.set_grad_enabled(backward), torch.cuda.graph(self._forth, pool=pool):
            hidden = compute(self._x.requires_grad_(backward), self._rows)
        self._hidden = hidden.detach()
        self._leaves: Sequence[Tensor] = ()
        if backward:
            with torch.cuda.graph(self._back, pool=pool):
                self._leaves = torch.autograd.grad(hidden, leaves, self._gradient)

    def _warm_up(self, compute: Compute, leaves: Sequence[Tensor], *, backward: bool) -> None:
        """Compile, and let libraries take their workspaces, before anything is captured."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.set_grad_enabled(backward):
            for _ in range(2):
                hidden = compute(self._x.detach().requires_grad_(backward), self._rows)
                if backward:
                    torch.autograd.grad(hidden, leaves, self._gradient)
        torch.cuda.current_stream().wait_stream(stream)

    @torch.no_grad()
    def run(self, x: Tensor, rows: Rows, real: int) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
        self._x.copy_(x)
        for ours, theirs in zip(_tensors(self._rows), _tensors(rows), strict=True):
            ours.copy_(theirs)
        self._forth.replay()

        def back(gradient: Tensor) -> Sequence[Tensor]:
            self._gradient[:real].copy_(gradient)
            self._gradient[real:].zero_()
            self._back.replay()
            return self._leaves

        return self._hidden[:real], back


def _tensors(rows: Rows) -> list[Tensor]:
    docs = rows.documents
    found = [rows.cos, rows.sin, rows.ends, docs.query_ends, docs.key_ends]
    return found if docs.keys is None else [*found, docs.keys]


def _cloned(rows: Rows) -> Rows:
    docs = rows.documents
    return Rows(
        rows.cos.clone(),
        rows.sin.clone(),
        docs._replace(
            query_ends=docs.query_ends.clone(),
            key_ends=docs.key_ends.clone(),
            keys=None if docs.keys is None else docs.keys.clone(),
        ),
        rows.ends.clone(),
    )


def _filled(x: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
    """Fill a pass up with one more document, which belongs to the last run."""
    # Keys that are gathered are filled up by themselves, and a document of keys needs a query.
    shares = rows.documents.keys is not None
    extra = rounded(len(x) + shares) - len(x)
    last = rows.ends[-1:]
    return _padded(x, extra), Rows(
        _padded(rows.cos, extra),
        _padded(rows.sin, extra),
        _with_one_more(rows.documents, len(x), extra),
        torch.where(rows.ends == last, last + extra, rows.ends),
    )


def _with_one_more(docs: Documents, rows: int, extra: int) -> Documents:
    keys = docs.keys
    more = extra
    if keys is not None:
        size = rounded(len(keys) + extra)
        more = size - len(keys)
        # Any row of the filling will do as a key of the filling.
        keys = torch.cat((keys, keys.new_full((more,), rows)))
    # Empty documents and too long ones cost next to nothing, other shapes a compilation.
    count = max(roomy(len(docs.query_ends)), roomy((rows + extra) // 128))
    longest = max(256, roomy(max(docs.longest_key, more)))
    return Documents(
        _lengthened(docs.query_ends, extra, count), _lengthened(docs.key_ends, more, count), longest, longest, keys
    )


def _lengthened(ends: Tensor, extra: int, count: int) -> Tensor:
    """Add one document of `extra` and then empty ones, up to `count` documents."""
    return torch.cat((ends, (ends[-1:] + extra).expand(count + 1 - len(ends))))


def _padded(x: Tensor, extra: int) -> Tensor:
    """Return x [rows, ...] with `extra` rows of zeros behind it."""
    return torch.cat((x, x.new_zeros(extra, *x.shape[1:])))
