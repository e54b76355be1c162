"""A mesh of real processes on this machine, to be measured: nats-server, trainers, samplers; and a run to train.

Everything lies in one directory, logs too. Who measures publishes on the bus and reads answers, as any client does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from services.local.config import Setting, write_toml
from services.local.nats_server import NatsServer
from shared import observe, topology
from shared.blobs import BlobStore
from shared.bus import Bus
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec, PolicyRecord
from shared.contracts.results import Result
from shared.contracts.training import (
    AdamParams,
    AnyOperation,
    CreateRun,
    Datum,
    ForwardBackward,
    LossSpec,
    OperationResult,
    OptimStep,
    RunRecord,
    SavePolicy,
)

START_SECONDS = 540.0
"""A vLLM that compiles takes minutes."""
STOP_SECONDS = 30.0


class Mesh:
    """Use `mesh`."""

    def __init__(self, directory: Path, url: str, bus: Bus) -> None:
        self.bus = bus
        self._directory = directory
        self._common = {"nats_url": url, "blob_url": str(directory / "blobs")}

    @contextlib.asynccontextmanager
    async def process(self, service: str, name: str, settings: Mapping[str, Setting]) -> AsyncIterator[None]:
        """Run a service until the end of the block, which begins when it is ready."""
        path = self._directory / f"{name}.toml"
        write_toml(path, {**self._common, "replica": name, **settings})
        with self.log(name).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", f"services.{service}", "--config", str(path), stderr=output
            )
        try:
            await self._ready(name, process)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()

    def log(self, name: str) -> Path:
        """Where a process writes its log."""
        return self._directory / f"{name}.log"

    def parts(self, name: str, message: str) -> dict[str, dict[str, float]]:
        """By policy, how long the parts of something took, from the log lines of a process that say `message`."""
        return {
            line["policy"]: line[observe.SECONDS]
            for line in self._lines(name)
            if observe.SECONDS in line and message in line["message"]
        }

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        for line in self.log(name).read_text().splitlines():
            with contextlib.suppress(ValueError):  # what libraries print before logging is set up
                yield json.loads(line)

    async def _ready(self, name: str, process: asyncio.subprocess.Process) -> None:
        replicas = self.bus.table(topology.REPLICAS)
        async with asyncio.timeout(START_SECONDS):
            while True:
                if process.returncode is not None:
                    raise RuntimeError(f"{name} ended at once: see {self.log(name)}")
                entry = await replicas.get(name)
                if entry is not None and entry.value.ready:
                    return
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def mesh(directory: Path) -> AsyncIterator[Mesh]:
    """Start a nats-server and connect to it; everything ends with the block."""
    directory.mkdir(parents=True, exist_ok=True)
    server = await NatsServer.start(directory / "nats")
    try:
        bus = await Bus.connect(server.url, BlobStore(str(directory / "blobs")), name="loadtest")
        try:
            yield Mesh(directory, server.url, bus)
        finally:
            await bus.close()
    finally:
        await server.stop()


class TrainedRun:
    """Writes one run's log."""

    def __init__(self, bus: Bus, base_model: str, run: str, lora: LoraSpec) -> None:
        self.run = run
        self._bus, self._base_model, self._lora = bus, base_model, lora
        self._seq = 0

    async def create(self) -> None:
        """Begin the run, and wait until a trainer has it."""
        record = RunRecord(run=self.run, base_model=self._base_model, lora=self._lora, owner=self.run)
        await self._bus.table(topology.RUNS).create(self.run, record)
        await self.send(self._operation(CreateRun, base_model=self._base_model, lora=self._lora))

    def step(self, tokens: list[int], version: int) -> list[AnyOperation]:
        """The operations of a step: a pass, the optimizer, and the policy that comes of it."""
        datum = Datum(tokens=Int32s(tokens[:-1]), targets=Int32s(tokens[1:]))
        return [
            self._operation(ForwardBackward, data=[datum], loss=LossSpec(name="cross_entropy")),
            self._operation(OptimStep, adam=AdamParams(learning_rate=1e-4)),
            self._operation(SavePolicy, version=version),
        ]

    async def policy(self, tokens: list[int], version: int) -> PolicyRecord:
        """Do a step and return its policy."""
        results = await asyncio.gather(*(self.send(operation) for operation in self.step(tokens, version)))
        last = results[-1]
        assert isinstance(last, OperationResult)
        assert last.policy is not None
        return last.policy

    async def send(self, operation: AnyOperation) -> Result:
        """Publish an operation and return its answer."""
        msg_id = f"{operation.run}/{operation.seq}"
        return await self._bus.ask(topology.OPERATIONS, operation, msg_id=msg_id, timeout=300, run=self.run)

    def _operation(self, kind: type[AnyOperation], **fields: Any) -> AnyOperation:
        made = kind(run=self.run, seq=self._seq, request_id=self._bus.new_request(), **fields)
        self._seq += 1
        return made
