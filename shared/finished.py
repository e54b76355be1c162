"""Which jobs have ended, so that nobody goes on working for them.

A job that is not known counts as going on: groups may be asked for by others than a coordinator.
"""

from __future__ import annotations

import logging

from shared import topology
from shared.bus import Bus
from shared.contracts.jobs import FINISHED, JobStanding
from shared.errors import MeshError, TemporaryError
from shared.tables import Change
from shared.tasks import Tasks

log = logging.getLogger(__name__)


class JobEnded(MeshError):
    """Nobody waits for this work any more."""


class FinishedJobs:
    """Follows the phases of all jobs, of which it reads nothing else."""

    def __init__(self, bus: Bus) -> None:
        self._table = bus.table(topology.JOB_STANDINGS)
        self._finished: set[str] = set()

    async def start(self, tasks: Tasks) -> None:
        """Read how all jobs stand now, and follow them from then on."""
        read = 0
        try:
            for entry in await self._table.items():
                self._take(Change(entry.key, entry.value, entry.revision))
                read = entry.revision
        except TemporaryError as error:
            log.warning("which jobs have ended is read later: %s", error)
        tasks.start("finished jobs", self._follow(read))

    def check(self, job: str) -> None:
        """Raise `JobEnded` if this job has been cancelled, or has failed or succeeded."""
        if job in self._finished:
            raise JobEnded(f"job {job} has ended")

    async def _follow(self, after: int) -> None:
        async for change in self._table.changes(after=after):
            self._take(change)

    def _take(self, change: Change[JobStanding]) -> None:
        ended = change.value is not None and change.value.phase in FINISHED
        (self._finished.add if ended else self._finished.discard)(change.key[0])
