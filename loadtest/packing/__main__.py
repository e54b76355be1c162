"""Measures packings against the exact optimum, and how long plans take.

python -m loadtest.packing [--instances N] [--seconds S] [--trace DIR] [--json FILE] [--only FAMILY] [--no-optimum]

For each family: GPUs used / fewest possible, over instances whose optimum is proved within the time; and then, given
exactly the GPUs of an optimal solution and none more, whether everything is placed again. The optimum is OR-tools'
CP-SAT's; that our packing needs no more GPUs than a lower bound also proves it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from loadtest.packing.instances import FAMILIES, GIB, Instance, generated
from loadtest.packing.trace import snapshots, whole
from services.autoscaler.packing.items import WHOLE, Item, Kind, Placement, Room
from services.autoscaler.packing.pack import pack


@dataclass
class Tally:
    """What came of a family."""

    ratios: list[float] = field(default_factory=list)
    unproved: int = 0
    infeasible: int = 0
    """Instances of which it is proved that not everything can be placed."""
    unmet: list[str] = field(default_factory=list)
    """Instances where something was left out that the optimum places."""
    worse: list[str] = field(default_factory=list)
    tight: int = 0
    tight_unmet: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Figures of the family."""
        return {
            "proved": len(self.ratios), "unproved": self.unproved, "infeasible": self.infeasible,
            "ratio": round(fmean(self.ratios), 4) if self.ratios else None, "worst": max(self.ratios, default=None),
            "worse": self.worse, "unmet": self.unmet, "tight": self.tight, "tight unmet": self.tight_unmet,
            "seconds": round(fmean(self.seconds), 3), "slowest": round(max(self.seconds), 3),
        }  # fmt: skip


def used(placement: Placement) -> int:
    """GPUs of a placement."""
    return len({gpu for gpus in placement.values() for gpu in gpus})


def measure(instances: Iterable[Instance], seconds: float) -> Tally:
    """Compare with the optimum."""
    from loadtest.packing.optimum import optimum  # noqa: PLC0415 - only where OR-tools is installed

    tally = Tally()
    for instance in instances:
        began = time.perf_counter()
        placement = pack(instance.items, instance.rooms)
        tally.seconds.append(time.perf_counter() - began)
        complete = len(placement) == len(instance.items)
        best = optimum(instance, seconds, at_most=used(placement) if complete else None)
        if best.gpus is None:
            tally.infeasible += best.feasible is False
            tally.unproved += best.feasible is not False
        elif not complete:
            tally.unmet.append(instance.name)
        else:
            tally.ratios.append(used(placement) / best.gpus)
            if used(placement) > best.gpus:
                tally.worse.append(f"{instance.name}: {used(placement)} for {best.gpus}")
            tally.tight += 1
            if len(pack(instance.items, best.rooms)) < len(instance.items):
                tally.tight_unmet.append(instance.name)
    return tally


def speed(trace: Path | None) -> dict[str, dict[str, Any]]:
    """Seconds for 10,000 replicas on 5,000 empty GPUs, and for the whole trace."""
    shapes = [
        Kind(memory * GIB, milli)
        for memory, milli in ((8, 100), (12, 150), (16, 200), (20, 250), (24, 300), (30, 350), (40, 500), (48, 200))
    ]

    def pools(draw: random.Random) -> Kind:
        return draw.choice(shapes) if draw.random() < 0.97 else Kind(80 * GIB, WHOLE, draw.choice((1, 2, 4, 8)))

    cases: dict[str, Callable[[random.Random], Kind]] = {
        "8 shapes and whole GPUs": pools,
        "about 1,000 shapes": lambda draw: Kind(draw.randint(6, 40) * GIB, draw.randint(4, 32) * 25),
        "10,000 shapes": lambda draw: Kind(draw.randint(6 * GIB, 40 * GIB), draw.randint(80, 500)),
    }
    rooms = [Room(f"n{gpu // 8}/{gpu % 8}", f"n{gpu // 8}", "H100", 80 * GIB) for gpu in range(5000)]
    instances = []
    for name, kind in cases.items():
        draw = random.Random(name)
        items = tuple(Item(f"r{number}", kind(draw)) for number in range(10_000))
        instances.append(Instance(name, name, items, tuple(rooms)))
    results = {}
    for instance in [*instances, *([whole(trace)] if trace else [])]:
        began = time.perf_counter()
        placement = pack(instance.items, instance.rooms)
        results[instance.name] = {
            "items": len(instance.items), "placed": len(placement), "gpus": used(placement),
            "bound": bound(instance), "seconds": round(time.perf_counter() - began, 2),
        }  # fmt: skip
    return results


def bound(instance: Instance) -> int:
    """GPUs that the sums alone need."""
    milli = sum(item.kind.milli * item.kind.gpus for item in instance.items) / WHOLE
    memory = sum(item.kind.memory * item.kind.gpus for item in instance.items)
    return -int(-max(milli, memory / max(room.memory for room in instance.rooms)) // 1)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=40, help="of each family")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the exact solver, for each instance")
    parser.add_argument("--trace", type=Path, help="directory with the openb CSV files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="a family")
    parser.add_argument("--no-optimum", action="store_true", help="measure speed only")
    arguments = parser.parse_args()
    families: dict[str, Iterable[Instance]] = {
        family: [generated(family, number) for number in range(arguments.instances)] for family in FAMILIES
    }
    if arguments.trace:
        families["openb"] = snapshots(arguments.trace, arguments.instances, 60)
    results: dict[str, Any] = {"families": {}, "speed": {}}
    if not arguments.no_optimum:
        for family, instances in families.items():
            if arguments.only in family:
                results["families"][family] = measure(instances, arguments.seconds).summary()
                print(family, json.dumps(results["families"][family]), flush=True)
    results["speed"] = speed(arguments.trace)
    for name, figures in results["speed"].items():
        print(name, json.dumps(figures), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
