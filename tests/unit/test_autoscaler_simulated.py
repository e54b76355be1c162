"""The policy in small simulated clusters: what `python -m loadtest.cluster_sim` shows at length."""

from __future__ import annotations

import dataclasses

from loadtest.cluster_sim.scenarios import Scenario, cluster, load_step, poisson, pool
from loadtest.cluster_sim.world import Faults, Record, Weather, World, reversals


def run(scenario: Scenario) -> tuple[World, Record]:
    world = scenario.world()
    return world, world.run(scenario.seconds)


def test_a_load_step_is_answered_within_six_seconds_and_the_number_turns_once_for_each_change() -> None:
    scenario = load_step()
    _, record = run(scenario)
    changes = record.wanted["a"]
    assert min(at for at, _ in changes if at >= 900.0) <= 906.0
    assert reversals(changes) <= 3, "at the beginning, up, and down: one way each"
    assert changes[-1][1] <= 4


def test_metrics_that_lag_are_lived_with() -> None:
    _, record = run(load_step(Weather(scrape_seconds=15.0, lag_seconds=5.0)))
    assert reversals(record.wanted["a"]) <= 3
    assert min(at for at, _ in record.wanted["a"] if at >= 900.0) <= 900.0 + 15.0 + 5.0 + 6.0


def test_without_prometheus_the_number_stays_and_then_falls() -> None:
    arrivals = poisson("a", [(0.0, 12.0), (500.0, 0.0)], 3000)
    faults = Faults(no_metrics=(400.0, 1400.0))
    _, record = run(Scenario("", (pool("a"),), cluster(1), tuple(arrivals), 3000, faults=faults))
    assert not [at for at, _ in record.wanted["a"] if 450.0 < at < 1400.0]
    assert record.wanted["a"][-1][1] == 0, "when it is known that there is nothing to do"


def test_a_lost_node_costs_no_sequence_and_is_made_up_for() -> None:
    arrivals = poisson("a", [(0.0, 8.0), (1100.0, 0.0)], 1300)
    faults = Faults(lost_nodes={"node0": 600.0})
    world, record = run(Scenario("", (pool("a", milli=1000),), cluster(3, 2), tuple(arrivals), 1300, faults=faults))
    assert world.pools["a"].finished == world.pools["a"].asked
    assert record.ready["a"][599] > record.ready["a"][602], "some were there"
    assert record.ready["a"][1000] >= 3


def test_no_pool_starves_while_others_want_all_there_is() -> None:
    rates = {"a": 40.0, "urgent": 20.0, "c": 0.5}
    arrivals = [each for name, rate in rates.items() for each in poisson(name, [(0.0, rate)], 900)]
    groups = tuple(pool(name, priority=10 if name == "urgent" else 0) for name in rates)
    world, record = run(Scenario("", groups, cluster(1, 2), tuple(arrivals), 900))
    for name in rates:
        assert min(record.ready[name][300:]) >= 1, f"{name} has a replica all the time"
    assert record.ready["urgent"][-1] == 6, "the rest goes by priority"
    assert max(world.pools["c"].waits) < 260


def test_the_same_simulation_gives_the_same_record() -> None:
    small = dataclasses.replace(load_step(), seconds=300.0)
    assert run(small)[1].wanted == run(small)[1].wanted
