"""What load tests compute from what they measure."""

from __future__ import annotations

from loadtest.sampler_rows import Row, percentile
from loadtest.shapes import SHAPES


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 201)]
    assert percentile(values, 0.5) == 100
    assert percentile(values, 0.99) == 198
    assert percentile([3.0, 1.0], 0.5) == 1.0
    assert percentile([7.0], 0.99) == 7.0


def test_times_may_be_less_and_shares_more_than_what_is_wanted() -> None:
    row = Row(
        "case", {"p50 ms": 200.0, "p99 ms": 400.0, "of one": 0.94}, {"p50 ms": 150, "p99 ms": 500, "of one": 0.95}
    )
    assert row.missed == ["p50 ms", "of one"]
    assert "MISSED: p50 ms wanted 150, of one wanted 0.95" in str(row)


def test_a_decoding_step_reads_every_weight_once_and_the_cache_of_every_sequence() -> None:
    shape = SHAPES["smollm2-135m"]
    assert 134e6 < shape.matmul_parameters < 135e6, "with tied embeddings all weights but the norms"
    assert shape.decode_bytes(0, 1000, 2) == 2 * shape.matmul_parameters
    of_a_position = 30 * 2 * 3 * 64 * 2
    assert shape.decode_bytes(8, 100, 2) - shape.decode_bytes(0, 0, 2) == 8 * 100 * of_a_position
