"""What Prometheus answers becomes the load of each group."""

from __future__ import annotations

from services.autoscaler.config import GroupConfig, ShapeConfig
from services.autoscaler.observed import Load, Measured
from services.autoscaler.readings import BUS_LOOK, SAMPLERS, TRAINERS, Labels, Series, loads

NOW = 1000.0
POOL = GroupConfig(name="pool", role="sampler", base_model="org/model", shape=ShapeConfig(memory_gib=1.0))
TRAINER = GroupConfig(name="trainers", role="trainer", base_model="org/model", shape=ShapeConfig(memory_gib=1.0))


def series(name: str, value: float, *, age: float = 0.0, base_model: str = "org/model") -> Series:
    earlier = (NOW - age - 2, "17")
    return Series(Labels(name, base_model), [earlier, (NOW - age, str(value))])


def looked(age: float = 0.5) -> Series:
    return series(BUS_LOOK, age, base_model="")


def test_the_newest_sample_counts_with_its_age() -> None:
    found = loads([series(SAMPLERS["running"], 3, age=4.0)], [POOL], NOW)
    assert found["pool"].running == Measured(3.0, 4.0)


def test_queues_are_as_old_as_the_look_at_the_bus() -> None:
    found = loads([series(SAMPLERS["queued"], 5, age=1.0), looked(age=7.0)], [POOL], NOW)
    assert found["pool"].queued == Measured(5.0, 8.0)


def test_a_queue_of_which_the_bus_has_nothing_is_empty_while_somebody_looks() -> None:
    found = loads([looked()], [POOL, TRAINER], NOW)
    assert found["pool"].queued == Measured(0.0, 0.5)
    assert found["trainers"].queued == Measured(0.0, 0.5)


def test_without_anybody_who_looks_at_the_bus_queues_are_missing() -> None:
    found = loads([series(SAMPLERS["queued"], 5)], [POOL], NOW)
    assert found["pool"].queued is None


def test_what_no_series_says_is_missing_and_other_models_do_not_count() -> None:
    found = loads([looked(), series(TRAINERS["duty"], 0.5, base_model="other")], [TRAINER], NOW)
    assert found["trainers"] == Load(queued=Measured(0.0, 0.5), oldest=Measured(0.0, 0.5))


def test_a_value_that_is_no_number_is_missing() -> None:
    found = loads([looked(), series(TRAINERS["duty"], float("nan"))], [TRAINER], NOW)
    assert found["trainers"].duty is None
