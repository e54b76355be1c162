"""Forgets a finished job for good: what it left in the blob store, on the bus and on disk, and at last its record.

The record goes last, so that whoever dies in between leaves a job that can be deleted again.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from services.coordinator.handlers import answer, check_request_id
from services.coordinator.metrics_file import path_of
from shared import topology
from shared.blobs import BlobStore
from shared.bus import Bus, Delivery
from shared.contracts.jobs import FINISHED, ControlJob, JobAnswer, JobRecord
from shared.errors import TemporaryError, UserError

FOLDERS = ("policies", "checkpoints", "snapshots")
"""Of the blob store, in which trainers keep a folder for each run."""


class Deletions:
    """Takes in which jobs are to be forgotten."""

    def __init__(self, bus: Bus, blobs: BlobStore, metrics_dir: Path) -> None:
        self._bus = bus
        self._blobs = blobs
        self._metrics_dir = metrics_dir
        self._jobs = bus.table(topology.JOB_RECORDS)
        self._leases = bus.table(topology.LEASES)
        self._runs = bus.table(topology.RUNS)
        self._policies = bus.table(topology.POLICIES)

    async def __call__(self, delivery: Delivery[ControlJob]) -> None:
        """Delete a job, if it is finished."""
        command = delivery.message
        check_request_id(command.request_id)
        entry = await self._jobs.get(command.job)
        if entry is None:
            if delivery.deliveries == 1:
                raise UserError(f"there is no job {command.job!r}: `openrl jobs` lists them")
        elif entry.value.phase not in FINISHED:
            raise UserError(f"job {command.job} is {entry.value.phase}: cancel it first, `openrl cancel {command.job}`")
        else:
            await self._delete(entry.value)
        await answer(self._bus, delivery, JobAnswer(request_id=command.request_id or "", job=command.job))

    async def _delete(self, record: JobRecord) -> None:
        for lease in (("job", record.job), ("run", record.run)):
            if await self._leases.get(lease) is not None:
                # Whoever holds it may still write what would then stay for ever; a finished one is soon let go of.
                raise TemporaryError(f"job {record.job} has ended and is still being put away: try again in a moment")
        for entry in await self._policies.items():
            if entry.key[0] == record.run:
                await self._policies.delete(entry.key)
        for folder in FOLDERS:
            await self._blobs.sweep(f"{folder}/{topology.token(record.run)}/", 0.0)
        await self._runs.delete(record.run)
        await self._bus.purge(topology.OPERATIONS, run=record.run)
        for channel in (topology.SCORED, topology.JOB_PROGRESS, topology.JOB_PHASES):
            await self._bus.purge(channel, job=record.job)
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(path_of(self._metrics_dir, record.job).unlink)
        await self._jobs.delete(record.job)
