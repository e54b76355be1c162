"""How fast samplers are, and how fast new weights reach them: `python -m loadtest.sampler --out DIRECTORY`.

    bus        1,024 prompts at once through the bus, and the same on the engine alone: the share that is left
    mixed      the same through the bus, four policies mixed against one
    roofline   decoding alone, random weights: bytes that a step must read (every weight, keys and values of all
               sequences; `loadtest.shapes`) over its time, of what the memory gives
    sync       optimizer step finished → first token of the new policy, with other requests running all the time
    generate   the torch engine against transformers' `model.generate`

Meshes are of real processes on this machine. Without a GPU all sizes are smaller. The table goes to standard output,
and with all logs into the directory, as `sampler.json`. The exit code is 1 if a figure misses what is wanted of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from loadtest.sampler_generate import CPU_CASES, GPU_CASES
from loadtest.sampler_generate import measure as against_generate
from loadtest.sampler_models import model_directory
from loadtest.sampler_offline import Batch, Offline
from loadtest.sampler_rows import Row, about
from loadtest.sampler_speed import Crowd, mixed, over_the_bus, roofline
from loadtest.sampler_sync import Load
from loadtest.sampler_sync import measure as measure_syncs
from services.local.config import Setting

SMALL = "smollm2-135m"


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""

    crowd: Crowd
    rooflines: dict[str, Batch]
    """By shape: sequences, prompt, new tokens."""
    load: Load
    syncs: int
    repeats: int


GPU = Sizes(
    crowd=Crowd(1024, 128, 256, sequences=256),
    rooflines={SMALL: (256, 128, 256), "qwen3-0.6b": (128, 128, 256), "llama-3-8b": (64, 128, 128)},
    load=Load(others=64, prompt=128, new=256),
    syncs=200,
    repeats=2,
)
CPU = Sizes(
    crowd=Crowd(32, 32, 32, sequences=16),
    rooflines={SMALL: (16, 32, 16)},
    load=Load(others=4, prompt=16, new=32),
    syncs=200,
    repeats=2,
)


class Bench:
    """All cases on one machine."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device: str = options.device
        self.sizes = GPU if self.device.startswith("cuda") else CPU
        self._options = options
        self._out: Path = options.out
        self._repeats: int = options.repeats or self.sizes.repeats
        self._common: dict[str, Setting] = {"device": self.device, "threads": options.threads}

    async def bus(self) -> AsyncIterator[Row]:
        """See the module's docstring."""
        crowd = self.sizes.crowd
        offline = self._offline(SMALL, crowd.sequences, [(crowd.requests, crowd.prompt, crowd.new)])
        yield await over_the_bus(self._out / "bus", self._sampler(), offline, crowd, self._vocabulary())

    async def mixed(self) -> AsyncIterator[Row]:
        """See the module's docstring."""
        sizes = self.sizes
        yield await mixed(self._out / "mixed", self._sampler(), sizes.crowd, self._vocabulary(), 4, self._repeats)

    async def roofline(self) -> AsyncIterator[Row]:
        """See the module's docstring."""
        for shape, (count, prompt, new) in self.sizes.rooflines.items():
            if self._options.shape and shape not in self._options.shape:
                continue
            yield await roofline(shape, self._offline(shape, count, [(count, prompt, new), (count, prompt, 1)]))

    async def sync(self) -> AsyncIterator[Row]:
        """See the module's docstring."""
        trainer = {**self._common, "model_dir": self._directory(SMALL)}
        row = await measure_syncs(
            self._out / "sync",
            self._sampler(),
            trainer,
            self._vocabulary(),
            self._options.syncs or self.sizes.syncs,
            self.sizes.load,
        )
        wanted = {"p50 ms": 150.0, "p99 ms": 500.0} if self.sizes is GPU else {}
        yield Row(row.case, row.figures, wanted)

    async def generate(self) -> AsyncIterator[Row]:
        """See the module's docstring."""
        cases = GPU_CASES if self.sizes is GPU else CPU_CASES
        directory, repeats = self._directory(SMALL), self._repeats
        threads = self._options.threads or torch.get_num_threads()
        async for row in against_generate(directory, self.device, repeats, threads, cases):
            yield row

    def _sampler(self) -> dict[str, Setting]:
        own = {"model_dir": self._directory(SMALL), "engine": self._options.engine, **self._options.sampler}
        return {**self._common, **own}

    def _offline(self, shape: str, sequences: int, batches: list[Batch]) -> Offline:
        return Offline(
            engine=self._options.engine,
            model_dir=self._directory(shape),
            device=self.device,
            sequences=sequences,
            batches=batches,
            repeats=self._repeats,
            threads=self._options.threads,
        )

    def _directory(self, shape: str) -> str:
        given: dict[str, str] = self._options.weights
        return given.get(shape) or str(model_directory(shape, self._out / "models", self.device))

    def _vocabulary(self) -> int:
        found: int = AutoConfig.from_pretrained(self._directory(SMALL)).vocab_size
        return found


CASES: dict[str, Callable[[Bench], AsyncIterator[Row]]] = {
    "generate": Bench.generate,
    "bus": Bench.bus,
    "mixed": Bench.mixed,
    "roofline": Bench.roofline,
    "sync": Bench.sync,
}


async def run(options: argparse.Namespace) -> bool:
    """Measure the chosen cases, one after the other; whether every figure is as wanted."""
    if (task := asyncio.current_task()) is not None:  # SIGTERM ends the mesh's processes too
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    options.out.mkdir(parents=True, exist_ok=True)
    conditions = {**about(options.device), "engine": options.engine, "command": " ".join(sys.argv)}
    print(json.dumps(conditions), flush=True)
    bench, rows = Bench(options), []
    for name in options.case or CASES:
        began = time.monotonic()
        async for row in CASES[name](bench):
            rows.append(row)
            print(row, flush=True)
            content = {**conditions, "rows": [asdict(row) for row in rows]}
            (options.out / "sampler.json").write_text(json.dumps(content, indent=1))
        print(f"# {name}: {time.monotonic() - began:.0f} s", flush=True)
    return not any(row.missed for row in rows)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], choices=CASES, help="default: all")
    parser.add_argument("--engine", default="torch", help="of the sampler: torch or vllm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each engine; default: all cores")
    parser.add_argument("--repeats", type=int, default=0, help="turns after the one that warms up")
    parser.add_argument("--shape", action="append", default=[], choices=GPU.rooflines, help="of `roofline`: only these")
    parser.add_argument("--syncs", type=int, default=0)
    parser.add_argument("--weights", action="append", default=[], metavar="SHAPE=DIRECTORY")
    parser.add_argument(
        "--sampler", action="append", default=[], metavar="KEY=VALUE", help="of its configuration, JSON"
    )
    parser.add_argument("--out", type=Path, default=Path("loadtest-sampler"), help="logs, models and sampler.json")
    options = parser.parse_args()
    options.weights = dict(pair.split("=", 1) for pair in options.weights)
    options.sampler = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in options.sampler)}
    sys.exit(0 if asyncio.run(run(options)) else 1)


if __name__ == "__main__":
    main()
