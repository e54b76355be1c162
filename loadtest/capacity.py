"""Measures how many runs one trainer's engine holds, and what moving them costs.

    python -m loadtest.capacity [--shape llama-3-8b] [--runs 256] [--resident 48] [--no-mlp] [--json FILE]

Creates the runs, of rank 16, parking the least recently used beyond `--resident` in host memory; then trains all of
them, some in each pass, bringing back and parking as a service would. Every run must answer.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import OrderedDict
from pathlib import Path

import psutil
import torch

from loadtest.shapes import SHAPES
from loadtest.trainer import about, make_engines
from services.trainer.engines.base import PassItem
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossSpec

LENGTH = 128
IN_A_PASS = 16


class Residents:
    """Runs of an engine, of which so many are on the device; the least recently used one makes room."""

    def __init__(self, engine: TorchTrainerEngine, most: int) -> None:
        self._engine, self._most = engine, most
        self._here: OrderedDict[str, None] = OrderedDict()
        self.seconds = {"park": 0.0, "bring back": 0.0}
        self.bytes = {"park": 0, "bring back": 0}

    def enter(self, run: str, *, created: bool) -> None:
        """See that a run is on the device."""
        if run in self._here:
            self._here.move_to_end(run)
            return
        if len(self._here) >= self._most:
            self._move("park", self._here.popitem(last=False)[0])
        if not created:
            self._move("bring back", run)
        self._here[run] = None

    def _move(self, how: str, run: str) -> None:
        began = time.perf_counter()
        (self._engine.park if how == "park" else self._engine.bring_back)(run)
        _wait()
        self.seconds[how] += time.perf_counter() - began
        self.bytes[how] += self._engine.size_of(run)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def create(engine: TorchTrainerEngine, residents: Residents, runs: list[str], spec: LoraSpec) -> float:
    """Create all runs; return the seconds that it took, moving included."""
    began = time.perf_counter()
    for number, run in enumerate(runs):
        residents.enter(run, created=True)
        engine.create_run(run, LoraSpec(rank=spec.rank, seed=number, train_mlp=spec.train_mlp))
    _wait()
    return time.perf_counter() - began


def train(engine: TorchTrainerEngine, residents: Residents, runs: list[str], vocabulary: int) -> float:
    """Train every run once, `IN_A_PASS` together; return the seconds."""
    draw = random.Random(0)
    began = time.perf_counter()
    for first in range(0, len(runs), IN_A_PASS):
        some = runs[first : first + IN_A_PASS]
        for run in some:
            residents.enter(run, created=False)
        items = []
        for run in some:
            tokens = [draw.randrange(vocabulary) for _ in range(LENGTH + 1)]
            data = [Datum(tokens=Int32s(tokens[:-1]), targets=Int32s(tokens[1:]))]
            items.append(PassItem(run, data, LossSpec(name="cross_entropy")))
        for outcome in engine.forward_backward(items):
            assert outcome.error is None, outcome.error
        for done in engine.optim_step(dict.fromkeys(some, AdamParams())).values():
            assert done.error is None, done.error
    _wait()
    return time.perf_counter() - began


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--runs", type=int, default=256)
    parser.add_argument("--resident", type=int, default=48)
    parser.add_argument("--no-mlp", action="store_true", help="adapt attention only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = make_engines(options.shape, None, IN_A_PASS * LENGTH)[False]
    residents = Residents(engine, options.resident)
    runs = [f"run-{number}" for number in range(options.runs)]
    created = create(engine, residents, runs, LoraSpec(rank=16, train_mlp=not options.no_mlp))
    first = train(engine, residents, runs, SHAPES[options.shape].vocabulary)
    again = train(engine, residents, runs, SHAPES[options.shape].vocabulary)
    rates = {how: residents.bytes[how] / max(1e-9, residents.seconds[how]) / 2**30 for how in residents.seconds}
    result = {
        **about(),
        "shape": options.shape,
        "runs": len(runs),
        "resident": options.resident,
        "mib_of_a_run": engine.size_of(runs[0]) / 2**20,
        "create_seconds": created,
        "train_all_seconds": [first, again],
        "gib_per_second": rates,
        "device_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "process_gib": psutil.Process().memory_info().rss / 2**30,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
