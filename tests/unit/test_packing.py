"""Packing keeps every token on its own path, and shares what is worth sharing."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.models.packing import Packed, Tree, common_prefix, fill_passes, grow_trees, pack

# Few different tokens, so that sequences often begin alike, contain one another or are equal.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)
WIDE = 10_000


def indexed(sequences: list[list[int]], first: int = 0) -> dict[int, array[int]]:
    return {first + index: array("i", tokens) for index, tokens in enumerate(sequences)}


def visible(packed: Packed, row: int) -> list[int]:
    """Return the rows that a row attends to."""
    (block,) = (block for block in packed.blocks if block.start <= row < block.stop)
    if block.mask is None:
        return list(range(block.start, row + 1))
    return [block.start + column for column in block.mask[row - block.start].nonzero()[:, 0].tolist()]


@given(SEQUENCES, st.sampled_from([None, 1, 8, WIDE]), st.integers(1, 40))
@settings(deadline=None)
def test_every_token_sees_exactly_its_own_sequence_up_to_itself(
    sequences: list[list[int]], pairs_per_token: int | None, max_rows: int
) -> None:
    data = indexed(sequences)
    packed = pack(grow_trees("run", data, max_rows=max_rows, pairs_per_token=pairs_per_token), data)
    assert packed.rows.keys() == data.keys()
    for index, tokens in data.items():
        rows = packed.rows[index].tolist()
        assert packed.tokens[rows].tolist() == list(tokens)
        assert packed.positions[rows].tolist() == list(range(len(tokens)))
        for position, row in enumerate(rows):
            assert visible(packed, row) == rows[: position + 1]


@given(SEQUENCES)
@settings(deadline=None)
def test_with_free_attention_every_distinct_prefix_is_one_row(sequences: list[list[int]]) -> None:
    data = indexed(sequences)
    # Equal first tokens share; sequences that have nothing in common are cheaper apart, which costs no row.
    trees = grow_trees("run", data, max_rows=WIDE, pairs_per_token=WIDE)
    prefixes = {tuple(tokens[: end + 1]) for tokens in sequences for end in range(len(tokens))}
    assert sum(tree.rows for tree in trees) == len(prefixes)


@given(SEQUENCES, st.sampled_from([1, 4, 16]))
@settings(deadline=None)
def test_no_other_cut_into_neighbours_is_cheaper(sequences: list[list[int]], pairs_per_token: int) -> None:
    data = indexed(sequences)
    order = sorted(sequences)

    def cost(group: list[list[int]]) -> int:
        rows = len({tuple(tokens[: end + 1]) for tokens in group for end in range(len(tokens))})
        return rows * (pairs_per_token + rows)

    cuts = range(2 ** (len(order) - 1))
    best = min(sum(map(cost, _cut(order, bits))) for bits in cuts)
    trees = grow_trees("run", data, max_rows=WIDE, pairs_per_token=pairs_per_token)
    assert sum(tree.rows * (pairs_per_token + tree.rows) for tree in trees) == best


def _cut(order: list[list[int]], bits: int) -> list[list[list[int]]]:
    groups = [[order[0]]]
    for place, tokens in enumerate(order[1:]):
        if bits >> place & 1:
            groups.append([])
        groups[-1].append(tokens)
    return groups


def test_a_group_with_one_prompt_holds_the_prompt_once() -> None:
    prompt = list(range(25))
    data = indexed([[*prompt, 100 + sample, *range(5)] for sample in range(8)])
    (tree,) = grow_trees("run", data, max_rows=1024, pairs_per_token=1152)
    assert tree.rows == 25 + 8 * 6


def test_trees_stay_within_the_limit_unless_one_sequence_exceeds_it() -> None:
    data = indexed([[1, 2, 3, 4, sample] for sample in range(6)]) | indexed([[9] * 30], first=6)
    trees = grow_trees("run", data, max_rows=7, pairs_per_token=WIDE)
    assert sorted(tree.rows for tree in trees) == [7, 7, 30]


def test_passes_take_trees_in_order_up_to_their_limit() -> None:
    data = indexed([[1] * 4, [2] * 3, [3] * 9, [4] * 2, [5] * 2])
    trees = grow_trees("run", data, max_rows=8, pairs_per_token=None)
    assert [[tree.rows for tree in part] for part in fill_passes(trees, 8)] == [[4, 3], [9], [2, 2]]
    assert list(fill_passes([], 8)) == []


def test_neighbouring_trees_of_a_run_are_one_segment() -> None:
    data = indexed([[1, 2], [3], [4, 5, 6]])
    one = grow_trees("one", {0: data[0], 1: data[1]}, max_rows=8, pairs_per_token=None)
    two = grow_trees("two", {2: data[2]}, max_rows=8, pairs_per_token=None)
    packed = pack([*one, *two], data)
    assert packed.segments == [("one", 0, 3), ("two", 3, 6)]
    assert [(block.start, block.stop) for block in packed.blocks] == [(0, 2), (2, 3), (3, 6)]


@given(SEQUENCES.filter(lambda sequences: len(sequences) > 1))
@settings(deadline=None)
def test_a_halved_tree_still_shows_every_token_its_own_path(sequences: list[list[int]]) -> None:
    data = indexed(sequences)
    (tree,) = (tree for tree in [_one_tree(data)])
    halves = tree.halves()
    assert sorted(b.sequence for half in halves for b in half.branches) == sorted(data)
    packed = pack(halves, data)
    for index, tokens in data.items():
        rows = packed.rows[index].tolist()
        assert packed.tokens[rows].tolist() == list(tokens)
        assert visible(packed, rows[-1]) == rows


def _one_tree(data: dict[int, array[int]]) -> Tree:
    """Return all sequences as one tree, shared or not."""
    trees = grow_trees("run", data, max_rows=WIDE, pairs_per_token=WIDE)
    return Tree("run", tuple(branch for tree in trees for branch in tree.branches))


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_the_common_prefix_is_the_longest(first: list[int], second: list[int]) -> None:
    length = common_prefix(array("i", first), array("i", second))
    assert first[:length] == second[:length]
    assert length in (len(first), len(second)) or first[length] != second[length]
