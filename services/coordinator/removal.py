"""Removes what runs leave behind. Each can be done again, by whoever finds it half done."""

from __future__ import annotations

import msgspec

from shared import topology
from shared.blobs import BlobStore
from shared.bus import Bus


async def close_run(bus: Bus, blobs: BlobStore, run: str) -> None:
    """No more operations come for a run: trainers let go of it, its log and its snapshot go."""
    runs = bus.table(topology.RUNS)
    # Before the record says so: whoever finds a run that is closed need not ask if its log is still there.
    await bus.purge(topology.OPERATIONS, run=run)
    while (entry := await runs.get(run)) is not None and not entry.value.closed:
        await runs.update(run, msgspec.structs.replace(entry.value, closed=True), entry.revision)
    while (entry := await runs.get(run)) is not None and (snapshot := entry.value.snapshot) is not None:
        await blobs.delete(snapshot.state.key)
        await runs.update(run, msgspec.structs.replace(entry.value, snapshot=None), entry.revision)
    await blobs.sweep(f"snapshots/{topology.token(run)}/", 0.0)  # those of trainers that died before they recorded them


async def delete_policy(bus: Bus, blobs: BlobStore, run: str, version: int) -> None:
    """Remove a policy's record, then its files. If there is none, nothing happens."""
    policies = bus.table(topology.POLICIES)
    entry = await policies.get((run, str(version)))
    if entry is None:
        return
    await policies.delete((run, str(version)))
    for ref in (entry.value.weights, entry.value.config):
        await blobs.delete(ref.key)
