"""Measures the trainer's engine: tokens per second, share of the peak, and what mixing runs in one pass gains.

    python -m loadtest.trainer [--case NAME ...] [--json FILE] [--profile DIRECTORY]

A step is `forward_backward` and `optim_step` of every run, from lists of token ids to logprobs in Python, as a service
calls it. What is compared is measured in turns, in one process. Shapes have random weights; `--weights` takes a
directory for one of them. Rank 16 on all linear layers, cross-entropy on every token, nothing recomputed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from loadtest.shapes import PEAK_FLOPS, SHAPES
from services.trainer.engines.base import PassItem
from services.trainer.engines.factory import fused_options
from services.trainer.engines.torch_engine import TorchTrainerEngine
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.policies import LoraSpec
from shared.contracts.training import AdamParams, Datum, LossSpec
from shared.models.loading import load_base

ADAM = AdamParams(learning_rate=1e-5)
RANK = 16


@dataclass(frozen=True)
class Case:
    """Runs with as many sequences each."""

    name: str
    shape: str
    runs: int
    sequences: int
    """Of each run."""
    length: int
    mixed: bool = True
    """All runs in one pass; otherwise one pass after another."""
    modules: bool = False
    """Run the model's own modules, as trainers that swap adapters do, in place of our compiled and captured layers."""
    against: tuple[str, ...] = ()
    """The cases that this one is compared with, in turns."""

    @property
    def tokens(self) -> int:
        """Of all runs together."""
        return self.runs * self.sequences * self.length


CASES = [
    Case("135m-1", "smollm2-135m", 1, 32, 512),
    Case("135m-8", "smollm2-135m", 8, 4, 512, against=("135m-1",)),
    Case("135m-32x512", "smollm2-135m", 32, 1, 512, against=("135m-32x512-apart", "135m-32x512-modules")),
    Case("135m-32x512-apart", "smollm2-135m", 32, 1, 512, mixed=False),
    Case("135m-32x512-modules", "smollm2-135m", 32, 1, 512, mixed=False, modules=True),
    Case("0.6b-1", "qwen3-0.6b", 1, 16, 1024),
    Case("0.6b-8x2k", "qwen3-0.6b", 8, 2, 1024, against=("0.6b-8x2k-apart", "0.6b-8x2k-modules")),
    Case("0.6b-8x2k-apart", "qwen3-0.6b", 8, 2, 1024, mixed=False),
    Case("0.6b-8x2k-modules", "qwen3-0.6b", 8, 2, 1024, mixed=False, modules=True),
    Case("8b-1", "llama-3-8b", 1, 4, 1024),
    Case("8b-8", "llama-3-8b", 8, 1, 512, against=("8b-1x512",)),
    Case("8b-1x512", "llama-3-8b", 1, 8, 512),
    Case("cpu-8x8", "smollm2-135m", 8, 1, 8, against=("cpu-8x8-apart",)),
    Case("cpu-8x8-apart", "smollm2-135m", 8, 1, 8, mixed=False),
    Case("cpu-8x24", "smollm2-135m", 8, 1, 24, against=("cpu-8x24-apart",)),
    Case("cpu-8x24-apart", "smollm2-135m", 8, 1, 24, mixed=False),
]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    tokens: int
    ms: float
    """Median of a step."""
    spread: float
    """Quartile range over median."""
    pass_ms: float
    """Of which in `forward_backward`."""
    tokens_per_second: float
    mfu: float | None
    gib: float | None
    """Highest memory allocated on the device."""
    times: dict[str, float] = field(default_factory=dict)
    """How many times faster than what it is compared with, by tokens per second."""


class Bench:
    """One case on an engine that has its runs."""

    def __init__(self, case: Case, engine: TorchTrainerEngine) -> None:
        self.case, self._engine = case, engine
        draw = random.Random(case.name)
        vocabulary = SHAPES[case.shape].vocabulary
        self._items = []
        for number in range(case.runs):
            run = f"{case.name}/{number}"
            engine.create_run(run, LoraSpec(rank=RANK, seed=number))
            data = [_datum(draw, vocabulary, case.length) for _ in range(case.sequences)]
            self._items.append(PassItem(run, data, LossSpec(name="cross_entropy")))
        self.seconds: list[tuple[float, float]] = []

    def step(self) -> None:
        """Do one step and write down what it and its passes took."""
        _wait()
        began = time.perf_counter()
        for items in [self._items] if self.case.mixed else [[item] for item in self._items]:
            for outcome in self._engine.forward_backward(items):
                assert outcome.error is None, outcome.error
        _wait()
        passed = time.perf_counter()
        for runs in [[item.run for item in self._items]] if self.case.mixed else [[i.run] for i in self._items]:
            for done in self._engine.optim_step(dict.fromkeys(runs, ADAM)).values():
                assert done.error is None, done.error
        _wait()
        self.seconds.append((time.perf_counter() - began, passed - began))

    def close(self) -> None:
        """Give the memory of its runs back."""
        for item in self._items:
            self._engine.drop_run(item.run)


def _datum(draw: random.Random, vocabulary: int, length: int) -> Datum:
    tokens = [draw.randrange(vocabulary) for _ in range(length + 1)]
    return Datum(tokens=Int32s(tokens[:-1]), targets=Int32s(tokens[1:]), weights=Float32s([1.0] * length))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    cases: Sequence[Case],
    engines: Mapping[bool, TorchTrainerEngine],
    repeats: int,
    report: Callable[[Row], None],
) -> None:
    """Measure cases in turns, after whatever they need to warm up; `engines` by `Case.modules`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    benches = [Bench(case, engines[case.modules]) for case in cases]
    for bench in benches:
        for _ in range(3):
            bench.step()
        bench.seconds.clear()
    for _ in range(repeats):
        for bench in benches:
            bench.step()
    rows = {bench.case.name: _row(bench) for bench in benches}
    for bench in benches:
        row = rows[bench.case.name]
        times = {
            name: row.tokens_per_second / rows[name].tokens_per_second for name in bench.case.against if name in rows
        }
        report(replace(row, times=times))
        bench.close()


def _row(bench: Bench) -> Row:
    case = bench.case
    steps, passes = zip(*bench.seconds, strict=True)
    middle = statistics.median(steps)
    low, _, high = statistics.quantiles(steps, n=4) if len(steps) > 1 else (middle, middle, middle)
    speed = case.tokens / middle
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device_name()), None)
    gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return Row(
        case=case.name,
        tokens=case.tokens,
        ms=1e3 * middle,
        spread=(high - low) / middle,
        pass_ms=1e3 * statistics.median(passes),
        tokens_per_second=speed,
        mfu=speed * SHAPES[case.shape].flops_per_token(case.length) / peak if peak else None,
        gib=gib,
    )


def device_name() -> str:
    """Return what it runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def show(row: Row) -> None:
    """Print one line."""
    mfu = f"{row.mfu:6.1%}" if row.mfu is not None else "     -"
    gib = f"{row.gib:6.1f}" if row.gib is not None else "     -"
    times = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in row.times.items())
    print(
        f"{row.case:20} {row.tokens:7d} tok {row.ms:9.1f} ms (±{row.spread:.0%}, passes {row.pass_ms:.1f}) "
        f"{row.tokens_per_second:10,.0f} tok/s  MFU {mfu}  {gib} GiB  {times}",
        flush=True,
    )


def about() -> dict[str, Any]:
    """Return hardware, versions and date."""
    return {
        "device": device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def make_engines(name: str, weights: str | None, most: int) -> dict[bool, TorchTrainerEngine]:
    """Return engines on one model of a shape: as the service would make it, and on the model's own modules."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: PreTrainedModel = load_base(weights, device=device) if weights else SHAPES[name].model(device, dtype)
    fused = fused_options(device)
    return {
        modules: TorchTrainerEngine(name, model, max_pass_tokens=most, fused=None if modules else fused)
        for modules in (False, True)
    }


def profiled(case: Case, engine: TorchTrainerEngine, directory: Path) -> None:
    """Write down which kernels a step spends its time in."""
    bench = Bench(case, engine)
    for _ in range(3):
        bench.step()
    with torch.profiler.profile() as profile:
        bench.step()
    bench.close()
    table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=45, max_name_column_width=90)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{case.name}.txt").write_text(table)


def groups(names: Sequence[str], *, modules: bool) -> list[list[Case]]:
    """Return the chosen cases, those that are compared together; by default all that this machine can run.

    Without `modules` nothing is compared with the model's own, which takes the longest.
    """
    here = [case for case in CASES if case.name.startswith("cpu") != torch.cuda.is_available()]
    chosen = [case for case in CASES if case.name in names] if names else here
    compared = {name for case in chosen for name in case.against}
    return [
        [case, *(other for other in CASES if other.name in case.against and (modules or not other.modules))]
        for case in chosen
        if case.name not in compared
    ]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], choices=[case.name for case in CASES])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--profile", type=Path, help="also write profiles into this directory")
    parser.add_argument("--no-modules", action="store_true", help="compare nothing with the model's own modules")
    parser.add_argument("--weights", action="append", default=[], metavar="SHAPE=DIRECTORY")
    options = parser.parse_args()
    weights = dict(pair.split("=", 1) for pair in options.weights)
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        show(row)
        if options.json:
            options.json.write_text(json.dumps({**about(), "rows": [asdict(row) for row in rows]}, indent=1))

    print(json.dumps(about()))
    by_shape: dict[str, list[list[Case]]] = {}
    for group in groups(options.case, modules=not options.no_modules):
        by_shape.setdefault(group[0].shape, []).append(group)
    for shape, found in by_shape.items():
        most = max(case.tokens for group in found for case in group)
        began = time.perf_counter()
        engines = make_engines(shape, weights.get(shape), most)
        print(f"# {shape}: loaded in {time.perf_counter() - began:.0f} s", flush=True)
        for group in found:
            began = time.perf_counter()
            measure(group, engines, options.repeats, report)
            print(f"# measured in {time.perf_counter() - began:.0f} s", flush=True)
            if options.profile:
                profiled(group[0], engines[group[0].modules], options.profile)
        del engines
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
