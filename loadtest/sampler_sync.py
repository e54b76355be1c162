"""How long new weights take from the trainer to the first token, with other requests running all the time.

A trainer and a sampler run as processes of their own, on one host. Each sync is a step as a job's coordinator publishes
it: a pass, an optimizer step, a policy. It is measured from the end of the optimizer step (the earlier of: its answer
is here; the trainer begins to look after the policy) to the arrival of a first token of the new policy, asked for when
the policy's answer is here. Meanwhile `others` requests of earlier policies and the base model run, each followed by
the next. The parts come from the logs of both processes:

    turn     optimizer step finished → the trainer takes up the policy
    look     is it there already (a replay)
    export   weights to bytes
    write    checksum and blob store
    record   bucket and announcement, stored by the bus
    heard    announced → the sampler begins (below 0: it was asked first)
    fetch    record and blobs, checksum compared
    place    waiting for a place among the policies
    load     read, checked, and put into the engine between two of its steps
    first    ready → a first token over the bus: its prompt waits for the step that is running
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.mesh import Mesh, TrainedRun, mesh
from loadtest.sampler_rows import Row, percentile
from services.local.config import Setting
from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec, PolicyRef
from shared.contracts.sampling import SampleRequest, SampleResult, SamplingParams
from shared.tasks import cancelled

MODEL = "measured"
PARTS = ("turn", "look", "export", "write", "record", "heard", "fetch", "place", "load", "first")
WARM_UP = 3


@dataclass(frozen=True)
class Load:
    """What runs beside the syncs."""

    others: int
    """Requests at the same time."""
    prompt: int
    new: int
    """Tokens that each of them generates."""
    policies: int = 3
    """Earlier policies that they are shared among, and the base model."""


@dataclass(frozen=True)
class Sync:
    """One sync, in wall-clock time."""

    policy: PolicyRef
    stepped: float
    answered: float


class Askers:
    """Requests that run all the time, of the newest few policies."""

    def __init__(self, bus: Bus, load: Load, vocabulary: int) -> None:
        self._bus, self._load, self._vocabulary = bus, load, vocabulary
        self.policies: list[PolicyRef | None] = [None]
        self.tokens = 0

    async def run(self, number: int) -> None:
        """Ask one request after the other."""
        draw = random.Random(number)
        while True:
            policy = draw.choice(self.policies)
            params = SamplingParams(max_tokens=self._load.new, stop=[])
            prompt = [draw.randrange(self._vocabulary) for _ in range(self._load.prompt)]
            result = await sample(self._bus, prompt, params, policy, f"other-{number % 4}")
            self.tokens += len(result.sequences[0].tokens)

    def add(self, policy: PolicyRef) -> None:
        """A newer policy; the oldest one is no longer asked for."""
        self.policies = [None, *[*self.policies[1:], policy][-self._load.policies :]]


async def sample(
    bus: Bus, prompt: Sequence[int], params: SamplingParams, policy: PolicyRef | None, owner: str
) -> SampleResult:
    """Ask the sampler."""
    request = SampleRequest(
        request_id=bus.new_request(),
        base_model=MODEL,
        prompt=Int32s(prompt),
        params=params,
        policy=policy,
        owner=owner,
    )
    result = await bus.ask(topology.SAMPLES, request, timeout=300, pool=MODEL)
    assert isinstance(result, SampleResult)
    assert result.policy == policy
    return result


async def measure(
    directory: Path,
    sampler: Mapping[str, Setting],
    trainer: Mapping[str, Setting],
    vocabulary: int,
    syncs: int,
    load: Load,
) -> Row:
    """Measure `syncs` syncs on a mesh of its own."""
    async with (
        mesh(directory) as ours,
        ours.process("trainer", "trainer", {"base_model": MODEL, **trainer}),
        ours.process("sampler", "sampler", {"base_model": MODEL, **sampler}),
    ):
        askers = Askers(ours.bus, load, vocabulary)
        running = [asyncio.create_task(askers.run(number)) for number in range(load.others)]
        try:
            began = time.monotonic()
            done = await _syncs(ours.bus, askers, vocabulary, syncs)
            rate = askers.tokens / (time.monotonic() - began)
            for task in running:
                if task.done():
                    task.result()
        finally:
            await cancelled(running)
        return _row(ours, done, rate)


async def _syncs(bus: Bus, askers: Askers, vocabulary: int, count: int) -> list[Sync]:
    draw = random.Random(0)
    run = TrainedRun(bus, MODEL, "run", LoraSpec(rank=16, seed=1))
    await run.create()
    done: list[Sync] = []
    for version in range(1, count + WARM_UP + 1):
        tokens = [draw.randrange(vocabulary) for _ in range(33)]
        first, step, save = run.step(tokens, version)
        policy = PolicyRef(run=run.run, version=version)
        stepped, *_ = await asyncio.gather(_when(run, step), run.send(first), run.send(save))
        await sample(bus, tokens, SamplingParams(max_tokens=1, stop=[]), policy, "measured")
        done.append(Sync(policy, stepped, time.time()))
        askers.add(policy)
        await asyncio.sleep(draw.uniform(0.0, 0.05))  # so that syncs keep no step with the sampler's
    return done[WARM_UP:]


async def _when(run: TrainedRun, operation: object) -> float:
    await run.send(operation)  # type: ignore[arg-type]
    return time.time()


def _row(ours: Mesh, done: Sequence[Sync], rate: float) -> Row:
    published, ready = ours.parts("trainer", "is published"), ours.parts("sampler", "is ready")
    parts = [_parts(sync, published[str(sync.policy)], ready[str(sync.policy)]) for sync in done]
    totals = [1e3 * sum(sync.values()) for sync in parts]
    figures = {"p50 ms": percentile(totals, 0.5), "p99 ms": percentile(totals, 0.99), "others tok/s": rate}
    for name in PARTS:
        values = [1e3 * sync[name] for sync in parts]
        figures |= {f"{name} p50": percentile(values, 0.5), f"{name} p99": percentile(values, 0.99)}
    return Row(f"sync-{len(done)}", figures)


def _parts(sync: Sync, published: Mapping[str, float], ready: Mapping[str, float]) -> dict[str, float]:
    """Return how long each part of a sync took. They add up to all of it."""
    parts = {name: published.get(name, 0.0) for name in ("look", "export", "write", "record")}
    parts |= {name: ready[name] for name in ("fetch", "place", "load")}
    stepped = min(sync.stepped, published["began"])
    announced = published["began"] + sum(parts[name] for name in ("look", "export", "write", "record"))
    loaded = ready["began"] + sum(parts[name] for name in ("fetch", "place", "load"))
    return parts | {
        "turn": published["began"] - stepped,
        "heard": ready["began"] - announced,
        "first": sync.answered - loaded,
    }
