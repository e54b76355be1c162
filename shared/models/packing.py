"""Packs sequences of many runs into one row without padding, and computes what they share only once.

Sequences of one run that begin alike (the samples of a group share their prompt) form a *tree*: each adds only the
tokens behind the longest prefix that it has in common with the one before it. A token attends to the tokens on its own
path and stands at the position that it has in its sequence, so its hidden state is what it would be alone. Trees never
attend to one another and never hold tokens of two runs, so numbers that overflow in one run stay there.

Everything here is plain data; `shared.models.attention` follows the layout.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """One sequence of a tree: its index, and how many of its first tokens the branch before it already brings."""

    sequence: int
    shared: int
    length: int

    @property
    def added(self) -> int:
        """Tokens that this branch adds to the tree."""
        return self.length - self.shared

    def alone(self) -> Branch:
        """Return it as the first of a tree, where it brings all of its tokens."""
        return Branch(self.sequence, 0, self.length)


@dataclass(frozen=True)
class Tree:
    """Sequences of one run that are packed together, in lexicographic order."""

    run: Hashable
    branches: tuple[Branch, ...]

    @property
    def rows(self) -> int:
        """Tokens after sharing."""
        return sum(branch.added for branch in self.branches)

    def halves(self) -> tuple[Tree, Tree]:
        """Split into two of at least one sequence each; the first sequence of the second shares nothing any more."""
        middle = (len(self.branches) + 1) // 2
        first, *rest = self.branches[middle:]
        return Tree(self.run, self.branches[:middle]), Tree(self.run, (first.alone(), *rest))


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` attend to each other only: causally, or where `mask` [rows, rows] is true."""

    start: int
    stop: int
    mask: Tensor | None


@dataclass(frozen=True)
class Packed:
    """A pass as the model gets it."""

    tokens: Tensor
    """Ids, int64 [rows]."""
    positions: Tensor
    """Of each token in its sequence, int64 [rows]."""
    blocks: list[Block]
    segments: list[tuple[Hashable, int, int]]
    """Which rows belong to which run, for `AdapterBank.use`."""
    rows: dict[int, Tensor]
    """For each sequence the rows of its tokens, int64 [N], on the CPU."""


def grow_trees(
    run: Hashable, sequences: dict[int, array[int]], *, max_rows: int, pairs_per_token: int | None
) -> list[Tree]:
    """Arrange the sequences of one run, by index, in the trees that are cheapest to compute.

    A tree is attended to densely, so joining sequences saves their common prefix but adds pairs of tokens that are
    computed for nothing. `pairs_per_token` says how many pairs cost as much as one token in the layers; None: no
    sharing, a tree for each sequence. No tree of several sequences exceeds `max_rows` tokens.
    """
    if pairs_per_token is None:
        return [Tree(run, (Branch(index, 0, len(tokens)),)) for index, tokens in sequences.items()]
    # Neighbours in lexicographic order have the longest common prefixes.
    order = sorted(sequences, key=lambda index: sequences[index])
    shared = [0, *(common_prefix(sequences[one], sequences[other]) for one, other in pairwise(order))]
    branches = [Branch(index, shared[place], len(sequences[index])) for place, index in enumerate(order)]
    return [
        Tree(run, (branches[first].alone(), *branches[first + 1 : last]))
        for first, last in pairwise([*_cheapest_cuts(branches, max_rows, pairs_per_token), len(branches)])
    ]


def _cheapest_cuts(branches: Sequence[Branch], max_rows: int, pairs_per_token: int) -> list[int]:
    """Return where trees begin in a row of branches, by dynamic programming over where the last tree begins."""
    cheapest = [0]
    begins: list[int] = []
    for last in range(len(branches)):
        lowest, begin, added = math.inf, last, 0
        for first in range(last, -1, -1):
            rows = branches[first].length + added
            cost = rows * (pairs_per_token + rows)
            if first < last and (rows > max_rows or cost >= lowest):
                break  # both only grow from here on
            if cheapest[first] + cost < lowest:
                lowest, begin = cheapest[first] + cost, first
            added += branches[first].added
        cheapest.append(int(lowest))
        begins.append(begin)
    cuts = []
    end = len(branches)
    while end:
        end = begins[end - 1]
        cuts.append(end)
    return cuts[::-1]


def common_prefix(first: array[int], second: array[int]) -> int:
    """Return how many tokens two sequences begin with in common. Bisects, since comparing slices is fast."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def fill_passes(trees: Sequence[Tree], max_rows: int) -> Iterator[list[Tree]]:
    """Cut a row of trees into passes of at most `max_rows` tokens, in order; a larger tree gets a pass of its own."""
    batch: list[Tree] = []
    rows = 0
    for tree in trees:
        if batch and rows + tree.rows > max_rows:
            yield batch
            batch, rows = [], 0
        batch.append(tree)
        rows += tree.rows
    if batch:
        yield batch


def pack(
    trees: Sequence[Tree],
    sequences: dict[int, array[int]],
    device: torch.device | str = "cpu",
    *,
    masks: bool = True,
) -> Packed:
    """Lay out trees one behind the other. Trees of one run should be neighbours, so that it has one segment.

    Without `masks` there are no blocks: the layout is for `shared.models.varlen`.
    """
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    rows: dict[int, Tensor] = {}
    blocks: list[Block] = []
    segments: list[tuple[Hashable, int, int]] = []
    stop = 0
    for tree in trees:
        start = stop
        path = torch.empty(0, dtype=torch.int64)
        for branch in tree.branches:
            new = torch.arange(stop, stop + branch.added)
            stop += branch.added
            path = rows[branch.sequence] = torch.cat((path[: branch.shared], new))
            tokens.append(torch.frombuffer(sequences[branch.sequence], dtype=torch.int32)[branch.shared :])
            positions.append(torch.arange(branch.shared, branch.length))
        if masks:
            blocks.append(Block(start, stop, _mask(tree, start, rows, device)))
        _extend(segments, tree.run, start, stop)
    return Packed(
        tokens=torch.cat(tokens).long().to(device),
        positions=torch.cat(positions).to(device),
        blocks=blocks,
        segments=segments,
        rows=rows,
    )


def _mask(tree: Tree, start: int, rows: dict[int, Tensor], device: torch.device | str) -> Tensor | None:
    """Return what a token of the tree may attend to: the tokens before it on its path, and itself."""
    if len(tree.branches) == 1:
        return None
    mask = torch.zeros(tree.rows, tree.rows, dtype=torch.bool)
    for branch in tree.branches:
        path = rows[branch.sequence] - start
        causal = torch.ones(branch.added, branch.length, dtype=torch.bool).tril(branch.shared)
        mask[path[branch.shared :, None], path] = causal
    return mask.to(device)


def _extend(segments: list[tuple[Hashable, int, int]], run: Hashable, start: int, stop: int) -> None:
    if segments and segments[-1][0] == run:
        segments[-1] = (run, segments[-1][1], stop)
    else:
        segments.append((run, start, stop))
