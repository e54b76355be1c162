"""Which runs leave the device and memory, decided without either."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.trainer.residency import Level, Limits, Residence, most_that_fit, to_evict, to_park

LIMITS = Limits(device_runs=3, device_bytes=0, host_runs=2, park_seconds=60, evict_seconds=600)


def on(level: Level, *used: float) -> list[Residence]:
    return [Residence(f"r{index}", level, when, size=10) for index, when in enumerate(used)]


def test_what_is_idle_is_parked_and_what_waits_is_not() -> None:
    runs = on(Level.DEVICE, 0, 50, 0)
    runs[2] = replace(runs[2], waits=True)
    assert to_park(runs, LIMITS, now=100) == ["r0"]
    assert to_park(runs, LIMITS, now=1000) == ["r0", "r1"]


def test_the_least_recently_used_leave_when_others_come() -> None:
    runs = on(Level.DEVICE, 90, 70, 80)
    assert to_park(runs, LIMITS, now=100) == []
    assert to_park(runs, LIMITS, now=100, coming=[10]) == ["r1"]
    assert to_park(runs, LIMITS, now=100, coming=[10, 10], keep={"r1"}) == ["r2", "r0"]


def test_what_waits_leaves_only_after_all_that_do_not() -> None:
    runs = on(Level.DEVICE, 1, 70, 80)
    runs[0] = replace(runs[0], waits=True)
    assert to_park(runs, LIMITS, now=90, coming=[10] * 3) == ["r1", "r2", "r0"]


def test_bytes_are_a_limit_of_their_own() -> None:
    limits = replace(LIMITS, device_bytes=25)
    assert to_park(on(Level.DEVICE, 1, 2), limits, now=3, coming=[10]) == ["r0"]
    assert to_park(on(Level.DEVICE, 1, 2), limits, now=3) == []
    assert most_that_fit(on(Level.HOST, 1, 2, 3), limits) == 2
    assert most_that_fit(on(Level.HOST, 1, 2, 3), replace(limits, device_bytes=5)) == 1
    assert most_that_fit(on(Level.HOST, 1, 2, 3, 4), LIMITS) == 3
    assert most_that_fit([], LIMITS) == 0


def test_host_memory_is_left_for_the_store_by_time_and_by_number() -> None:
    runs = on(Level.HOST, 900, 950, 940)
    assert to_evict(runs, LIMITS, now=1000) == ["r0"]
    assert to_evict(runs[:2], LIMITS, now=1000) == []
    assert to_evict(runs, LIMITS, now=2000) == ["r0", "r2", "r1"]
    assert to_evict(on(Level.DEVICE, 0, 0, 0), LIMITS, now=2000) == []


def test_a_run_in_the_middle_of_an_operation_is_parked_but_never_written_out() -> None:
    runs = [replace(each, begun=True, waits=True) for each in on(Level.HOST, 0, 1, 2)]
    assert to_evict(runs, LIMITS, now=10_000) == []
    there = [replace(each, level=Level.DEVICE) for each in runs]
    assert to_park(there, LIMITS, now=3, coming=[10]) == ["r0"]


RESIDENCES = st.builds(
    Residence,
    run=st.text("abcdefgh", min_size=1, max_size=3),
    level=st.sampled_from(Level),
    used=st.floats(0, 100),
    size=st.integers(0, 50),
    waits=st.booleans(),
    begun=st.booleans(),
)


@given(st.lists(RESIDENCES, unique_by=lambda each: each.run, max_size=12), st.sets(st.text("abcdefgh", max_size=3)))
def test_limits_hold_afterwards_but_for_what_is_kept(runs: list[Residence], keep: set[str]) -> None:
    parked = to_park(runs, LIMITS, now=100, keep=keep)
    left = [each for each in runs if each.level is Level.DEVICE and each.run not in parked]
    assert len(left) <= LIMITS.device_runs or all(each.run in keep for each in left)
    evicted = to_evict(runs, LIMITS, now=100, keep=keep)
    assert not keep & {*parked, *evicted}
    held = [each for each in runs if each.level is Level.HOST and each.run not in evicted]
    assert len(held) <= LIMITS.host_runs or all(each.run in keep or each.begun for each in held)
