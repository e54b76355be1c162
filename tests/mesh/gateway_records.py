"""Records as trainers and gateways write them, and clients that look them up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from tinker import AdminClient, RestClient

from shared import topology
from shared.bus import Bus
from shared.checkpoints import path_of
from shared.contracts.checkpoints import CheckpointKey, CheckpointKind, CheckpointRecord
from shared.contracts.policies import LoraSpec
from shared.contracts.sessions import SessionRecord
from shared.contracts.training import RunRecord
from tests.mesh.gateways import KEY
from tests.mesh.harness import MODEL

NOW = time.time()
ADMIN_KEY = "tml-test-key-of-an-administrator"


class Records:
    """Writes what trainers and gateways would have written."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    async def session(self, name: str, created: float, owner: str = "default", **fields: Any) -> str:
        record = SessionRecord(session=name, owner=owner, created=created, **fields)
        await self.bus.table(topology.SESSIONS).put(name, record)
        return name

    async def run(self, session: str, number: int, created: float, owner: str = "default", **fields: Any) -> str:
        run = f"{session}:train:{number}"
        record = RunRecord(
            run=run, base_model=MODEL, lora=LoraSpec(rank=8), owner=owner, session=session, created=created, **fields
        )
        await self.bus.table(topology.RUNS).put(run, record)
        return run

    async def checkpoint(
        self,
        run: str,
        kind: CheckpointKind,
        name: str,
        created: float,
        owner: str = "default",
        files: dict[str, bytes] | None = None,
        **fields: Any,
    ) -> str:
        refs = {
            file: await self.bus.blobs.put(f"checkpoints/{topology.token(run)}/{name}/{file}", content)
            for file, content in (files or {}).items()
        }
        state = await self.bus.blobs.put(f"checkpoints/{topology.token(run)}/{name}-{kind}", b"state")
        record = CheckpointRecord(
            key=CheckpointKey(run=run, kind=kind, name=name),
            base_model=MODEL,
            lora=LoraSpec(rank=8),
            owner=owner,
            seq=1,
            created=created,
            size=sum(ref.size for ref in refs.values()) or state.size,
            state=state if kind == "training" else None,
            files=refs,
            **fields,
        )
        await self.bus.table(topology.CHECKPOINTS).put((run, kind, name), record)
        return path_of(record.key)


async def client(url: str, key: str = KEY) -> RestClient:
    return await asyncio.to_thread(lambda: RestClient(base_url=url, api_key=key))


async def admin(url: str, key: str = ADMIN_KEY) -> AdminClient:
    return await asyncio.to_thread(lambda: AdminClient(base_url=url, api_key=key))


async def ask(call: Callable[[], Any]) -> Any:
    """What a call of the client gives; made in a thread, since it may block."""
    return await asyncio.to_thread(lambda: call().result(timeout=30))
