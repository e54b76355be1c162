"""Simulates clusters with the autoscaler's policy, and prints what came of it.

python -m loadtest.cluster_sim [--trace DIR] [--only NAME] [--json FILE] [--panic-threshold X] [--down-seconds S]
"""

from __future__ import annotations

import argparse
import json
import time
from math import ceil
from pathlib import Path
from typing import Any

import msgspec

from loadtest.cluster_sim.scenarios import SCENARIOS, Scenario, trace
from loadtest.cluster_sim.world import World, mean, percentile, reversals


def first_decision(changes: list[tuple[float, int]], step: float) -> float | None:
    """Seconds from a load step to the next change of the number."""
    return next((at - step for at, _ in changes[1:] if at >= step), None)


def figures(scenario: Scenario, seed: int = 0) -> dict[str, Any]:
    """Simulate once, and measure; and once more with as many replicas as ever wanted, each on a GPU of its own."""
    world = scenario.world(seed)
    began = time.perf_counter()
    record = world.run(scenario.seconds)
    seconds = time.perf_counter() - began
    fixed, needed = static(scenario, record.wanted)
    waits = [wait for pool in world.pools.values() for wait in pool.waits]
    plain = [wait for pool in fixed.pools.values() for wait in pool.waits]
    return {
        "scenario": scenario.name,
        "decided after a step (s)": [
            first_decision(changes, step) for step in scenario.steps for changes in record.wanted.values()
        ],
        "changes": {name: len(changes) - 1 for name, changes in record.wanted.items()},
        "reversals": {name: reversals(changes) for name, changes in record.wanted.items()},
        "most replicas": {name: max(number for _, number in changes) for name, changes in record.wanted.items()},
        "fewest without metrics": {
            name: fewest_without_metrics(scenario, changes) for name, changes in record.wanted.items()
        },
        "moves": record.moves,
        "held plans": record.holds,
        "gpus on average": round(mean(record.gpus), 2),
        "gpus at most": max(record.gpus),
        "wait p50 (s)": round(percentile(waits, 0.5), 1),
        "wait p99 (s)": round(percentile(waits, 0.99), 1),
        "longest wait by pool (s)": {name: round(max(pool.waits, default=0.0)) for name, pool in world.pools.items()},
        "unserved": {name: pool.asked - pool.finished for name, pool in world.pools.items()},
        "static gpus": needed,
        "static wait p99 (s)": round(percentile(plain, 0.99), 1),
        "seconds of a plan": round(seconds / (scenario.seconds / scenario.scaling.tick_seconds), 5),
    }


def static(scenario: Scenario, wanted: dict[str, list[tuple[float, int]]]) -> tuple[World, int]:
    """The same load on replicas that are always there, each on a GPU of its own: as many as the peak takes."""
    most = {name: max(number for _, number in changes) for name, changes in wanted.items()}
    counts = {}
    for name, peak in _on(scenario, most).record.busiest.items():
        counts[name] = ceil(peak / next(group.slots for group in scenario.groups if group.name == name))
    return _on(scenario, counts), sum(counts.values())


def _on(scenario: Scenario, counts: dict[str, int]) -> World:
    faults = type(scenario.faults)()
    world = World(scenario.groups, (), scenario.arrivals, scenario.weather, faults, scenario.scaling, fixed=True)
    for name, count in counts.items():
        for number in range(count):
            world.add_ready(name, (f"{name}{number}",))
    world.run(scenario.seconds)
    return world


def fewest_without_metrics(scenario: Scenario, changes: list[tuple[float, int]]) -> int | None:
    """The least that was wanted while there were no metrics."""
    low, high = scenario.faults.no_metrics
    if high <= low:
        return None
    before = [number for at, number in changes if at <= low]
    return min([*before[-1:], *(number for at, number in changes if low < at < high)], default=None)


def main() -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, help="directory with AzureLLMInferenceTrace_{conv,code}.csv")
    parser.add_argument("--only", help="a word of the scenario's name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--panic-threshold", type=float)
    parser.add_argument("--down-seconds", type=float)
    arguments = parser.parse_args()
    scenarios = [make() for make in SCENARIOS] + ([trace(arguments.trace)] if arguments.trace else [])
    results = []
    for scenario in scenarios:
        if arguments.only and arguments.only not in scenario.name:
            continue
        changed = {
            name: value
            for name in ("panic_threshold", "down_seconds")
            if (value := getattr(arguments, name)) is not None
        }
        if changed:
            scaling = msgspec.structs.replace(scenario.scaling, **changed)
            scenario = Scenario(**{**scenario.__dict__, "scaling": scaling})  # noqa: PLW2901 - the same, changed
        result = figures(scenario)
        results.append(result)
        print(*(f"{key}: {value}" for key, value in result.items()), sep="\n  ", end="\n\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
