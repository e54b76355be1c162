"""Admission, prefill groups, cache growth and compaction of the torch sampler."""

from __future__ import annotations

import random

import pytest

from services.sampler.engines.batching import (
    BLOCK,
    Room,
    Running,
    Shape,
    Waiting,
    admit,
    compaction,
    grown,
    padded,
    prefill_groups,
)

ROOM = Room(rows=8, positions=8 * 64, prompt_tokens=100)


def waiting(rows: int = 1, prompt: int = 10, length: int = 64, *, isolated: bool = False) -> Waiting:
    return Waiting(rows, prompt, length, isolated)


def test_requests_begin_in_order_until_the_rows_are_taken() -> None:
    assert admit([waiting(4), waiting(3), waiting(1), waiting(1)], Running(), ROOM) == 3
    assert admit([waiting(4), waiting(3)], Running(rows=5, length=64), ROOM) == 0


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    assert admit([waiting(8), waiting(1)], Running(rows=1, length=64), ROOM) == 0


def test_a_long_request_counts_for_every_row_of_the_rectangle() -> None:
    assert admit([waiting(1, length=128)], Running(rows=3, length=64), ROOM) == 1
    assert admit([waiting(1, length=128)], Running(rows=4, length=64), ROOM) == 0
    assert admit([waiting(2, length=64)], Running(rows=3, length=128), ROOM) == 0


def test_scoring_a_prompt_takes_no_row_and_no_length() -> None:
    assert admit([waiting(0, length=10_000)], Running(rows=8, length=64), ROOM) == 1


def test_prompts_beyond_the_budget_wait_for_the_next_step_but_one_always_begins() -> None:
    assert admit([waiting(prompt=60), waiting(prompt=60)], Running(), ROOM) == 1
    assert admit([waiting(prompt=600), waiting(prompt=1)], Running(), ROOM) == 1


def test_an_isolated_request_begins_alone_and_keeps_others_out() -> None:
    alone = waiting(isolated=True)
    assert admit([alone, waiting()], Running(), ROOM) == 1
    assert admit([waiting(), alone], Running(), ROOM) == 1
    assert admit([alone], Running(rows=1, length=64), ROOM) == 0
    assert admit([waiting()], Running(rows=1, length=64, isolated=True), ROOM) == 0


def test_every_prompt_is_in_one_group_and_no_group_exceeds_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 30))]
        groups = prefill_groups(lengths, 512)
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        for group in groups:
            area = len(group) * max(lengths[index] for index in group)
            padding = area - sum(lengths[index] for index in group)
            assert len(group) == 1 or area <= 512
            assert padding <= max(area // 4, 64)


def test_prompts_of_similar_length_are_computed_together() -> None:
    assert len(prefill_groups([25, 22, 28, 24], 8192)) == 1
    assert len(prefill_groups([2000, 10, 2000, 12], 8192)) == 2
    assert prefill_groups([], 8192) == []


def test_the_cache_doubles_up_to_what_is_promised_and_never_beyond_the_room() -> None:
    room = Room(rows=128, positions=128 * 1024, prompt_tokens=1)
    assert grown(Shape(), Shape(1, 32), 512, room) == Shape(8, 64)
    assert grown(Shape(8, 64), Shape(9, 64), 512, room) == Shape(16, 64)
    assert grown(Shape(8, 64), Shape(8, 80), 512, room) == Shape(8, 128)
    assert grown(Shape(8, 64), Shape(8, 80), 96, room) == Shape(8, 96)
    assert grown(Shape(8, 64), Shape(3, 48), 64, room) == Shape(8, 64)


def test_a_cache_that_was_long_becomes_short_where_many_rows_are_needed() -> None:
    room = Room(rows=128, positions=8192, prompt_tokens=1)
    assert grown(Shape(1, 8192), Shape(128, 64), 64, room) == Shape(128, 64)


def test_growth_always_fits_the_need_and_the_room() -> None:
    rng = random.Random(1)
    room = Room(rows=64, positions=64 * 256, prompt_tokens=1)
    shape = Shape()
    for _ in range(2000):
        rows = rng.randint(1, 64)
        promised = padded(rng.randint(1, room.positions // rows // BLOCK * BLOCK))
        need = Shape(rows, padded(rng.randint(1, promised)))
        shape = grown(shape, need, promised, room)
        assert shape.rows >= need.rows
        assert shape.length >= need.length
        assert shape.rows * shape.length <= room.positions


@pytest.mark.parametrize("seed", range(20))
def test_compaction_keeps_exactly_the_rows_that_go_on(seed: int) -> None:
    rng = random.Random(seed)
    ended = [rng.random() < 0.4 for _ in range(rng.randint(1, 20))]
    rows = list(range(len(ended)))
    movers, holes = compaction(ended)
    for mover, hole in zip(movers, holes, strict=True):
        rows[hole] = rows[mover]
    left = [row for row in range(len(ended)) if not ended[row]]
    assert sorted(rows[: len(left)]) == left
    assert len(movers) <= sum(ended)
