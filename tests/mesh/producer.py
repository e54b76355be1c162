"""Writes the logs of runs, as a gateway would."""

from __future__ import annotations

import asyncio
from typing import Any

from shared import topology
from shared.bus import Bus
from shared.contracts.arrays import Int32s
from shared.contracts.policies import LoraSpec
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
)
from tests.mesh.harness import MODEL

LORA = LoraSpec(rank=16, seed=1, train_unembed=True)


class Producer:
    """Writes one run's log as a gateway would."""

    def __init__(self, bus: Bus, run: str, owner: str = "default") -> None:
        self.bus = bus
        self.run = run
        self.owner = owner
        self.seq = 0

    async def create(self) -> OperationResult:
        await self.record()
        return await self.send(self.make(CreateRun, base_model=MODEL, lora=LORA))

    async def record(self) -> None:
        record = RunRecord(run=self.run, base_model=MODEL, lora=LORA, owner=self.owner)
        await self.bus.table(topology.RUNS).create(self.run, record)

    def make(self, kind: type[AnyOperation], **fields: Any) -> AnyOperation:
        operation = kind(run=self.run, seq=self.seq, request_id=self.bus.new_request(), **fields)
        self.seq += 1
        return operation

    async def send(self, operation: AnyOperation) -> OperationResult:
        msg_id = f"{operation.run}/{operation.seq}"
        result = await self.bus.ask(topology.OPERATIONS, operation, msg_id=msg_id, timeout=30, run=self.run)
        assert isinstance(result, OperationResult)
        return result

    def train(self, tokens: list[int], **fields: Any) -> AnyOperation:
        datum = Datum(tokens=Int32s(tokens[:-1]), targets=Int32s(tokens[1:]))
        return self.make(ForwardBackward, data=[datum], loss=LossSpec(name="cross_entropy"), **fields)

    def step(self) -> AnyOperation:
        return self.make(OptimStep, adam=AdamParams(learning_rate=0.02))

    async def learn(self, tokens: list[int], *, steps: int) -> None:
        operations = [operation for _ in range(steps) for operation in (self.train(tokens), self.step())]
        await asyncio.gather(*(self.send(operation) for operation in operations))
