"""What becomes of a job, written down and told: its record, its run, its events, its file of metrics."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from services.coordinator import policy
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.metrics_file import MetricsFile
from services.coordinator.patience import Patience
from services.coordinator.removal import close_run, delete_policy
from shared import topology
from shared.contracts.jobs import (
    FINISHED,
    Evaluation,
    JobChanged,
    JobPhase,
    JobProgressed,
    JobRecord,
    JobSpec,
    StepReport,
)
from shared.contracts.policies import PolicyRecord
from shared.contracts.training import RunRecord
from shared.errors import MeshError
from shared.node import Node

log = logging.getLogger(__name__)

LONGEST_REASON = 4000
"""Characters: a record must stay small enough for the bus, whatever other people's code raises."""


class LostJob(MeshError):
    """Somebody else drives the job now."""


class Records:
    """The one writer of a job's record, as long as its lease is held."""

    def __init__(
        self, node: Node, record: JobRecord, revision: int, metrics: CoordinatorMetrics, metrics_dir: Path
    ) -> None:
        self.record = record
        self.outstanding = policy.indexes_asked_for(record)
        """Indexes of training groups that were asked for and not yet used."""
        self.patience = Patience(record.job)
        self._revision = revision
        self._node = node
        self._metrics = metrics
        self._file = MetricsFile(metrics_dir / f"{topology.token(record.job)}.jsonl")
        self._bus = node.bus
        self._jobs = node.bus.table(topology.JOB_RECORDS)
        self._runs = node.bus.table(topology.RUNS)
        self._policies = node.bus.table(topology.POLICIES)
        self._published: set[int] | None = None
        self._possible: tuple[JobRecord, ...] = ()
        """What the bucket may hold if nobody but us and the owner has written."""

    @property
    def job(self) -> str:
        """The job's id."""
        return self.record.job

    @property
    def spec(self) -> JobSpec:
        """What was asked for."""
        return self.record.spec

    async def save(self, **changes: Any) -> None:
        """Change the record, here and in the bucket."""
        while not await self.patience(functools.partial(self._stored, changes)):
            pass

    async def save_outstanding(self, indexes: Collection[int], **changes: Any) -> None:
        """Change which training groups are outstanding, and more."""
        await self.save(asked=policy.spans(indexes), outstanding=[], **changes)
        self.outstanding = set(indexes)

    async def _stored(self, changes: dict[str, Any]) -> bool:
        """Try to write changes. False: somebody else wrote the record, and it has been read again."""
        record = msgspec.structs.replace(self.record, **changes)
        # A write whose answer got lost may have been stored.
        self._possible = (self.record, record)
        revision = await self._jobs.update(self.job, record, self._revision)
        if revision is None:
            await self._reread()
            return False
        self.record, self._revision = record, revision
        return True

    async def _reread(self) -> None:
        """Somebody wrote the record: its owner, who may only have changed what is wanted, or another coordinator."""
        entry = await self._jobs.get(self.job)
        if entry is None or msgspec.structs.replace(entry.value, wanted=self.record.wanted) not in self._possible:
            raise LostJob(f"job {self.job} is driven, or was ended, by somebody else")
        self._revision = entry.revision
        self.record = msgspec.structs.replace(self.record, wanted=entry.value.wanted)

    async def enter(self, phase: JobPhase, reason: str, **changes: Any) -> None:
        """Enter another phase, and tell."""
        finished = time.time() if phase in FINISHED else None
        reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} ..."
        await self.save(phase=phase, reason=reason, finished=finished, **changes)
        log.info("job %s is %s%s", self.job, phase, f": {reason}" if reason else "")
        event = JobChanged(
            job=self.job,
            phase=phase,
            reason=reason,
            evaluations=self.record.evaluations,
            policy=self.record.policy,
        )
        await self._tell(topology.JOB_PHASES, event, f"{self.job}/{phase}/{self._revision}")

    async def finish(self, phase: JobPhase, reason: str) -> None:
        """End the job: no more operations come for its run."""
        # Nothing will be replayed: the checkpoint of the last step is what stays.
        await close_run(self._bus, self._node.blobs, self.record.run)
        await self.enter(phase, reason)
        self._metrics.ended(self.job, phase)

    async def create_run(self) -> None:
        """Make the job's run known to trainers, unless that was done before."""
        record = RunRecord(
            run=self.record.run, base_model=self.spec.base_model, lora=self.spec.lora, owner=self.record.owner
        )
        await self._runs.create(self.record.run, record)

    async def stepped(self, row: StepReport) -> None:
        """Count a step, and tell of it."""
        self._metrics.stepped(self.job, row)
        await self._tell_step(row)

    async def evaluated(self, evaluation: Evaluation) -> None:
        """Count an evaluation, and tell of it."""
        self._metrics.evaluated(self.job, evaluation)
        await self._tell_evaluation(evaluation)

    async def tell_again(self) -> None:
        """Tell what was written down last, unless it was told: whoever wrote it may have died in between."""
        if self.record.last is not None:
            await self._tell_step(self.record.last)
        if self.record.evaluations:
            await self._tell_evaluation(self.record.evaluations[-1])

    def place_of(self, published: PolicyRecord) -> str:
        """Where a policy's files lie, for people."""
        folder = published.weights.key.rpartition("/")[0]
        path = self._node.blobs.path(folder)
        return str(path) if path else f"{self._node.blobs.url.rstrip('/')}/{folder}"

    async def delete_policies(self, needed: set[int], keep: int) -> None:
        """Delete versions that nobody will ask for. Failing to is only a waste of space."""
        try:
            published = await self._published_versions()
            for version in policy.versions_to_delete(published, needed, keep):
                await delete_policy(self._bus, self._node.blobs, self.record.run, version)
                published.discard(version)
        except MeshError as error:
            log.warning("old policies of job %s stay for now: %s", self.job, error)

    async def _published_versions(self) -> set[int]:
        if self._published is None:
            run = self.record.run
            self._published = {int(e.key[1]) for e in await self._policies.items() if e.key[0] == run}
        if self.record.policy is not None:
            self._published.add(self.record.policy.version)
        return self._published

    async def _tell_step(self, row: StepReport) -> None:
        self._file.append("step", row)
        event = JobProgressed(job=self.job, step=row.step, steps=self.spec.algorithm.steps, report=row)
        await self._tell(topology.JOB_PROGRESS, event, f"{self.job}/step/{row.step}")

    async def _tell_evaluation(self, evaluation: Evaluation) -> None:
        self._file.append("evaluation", evaluation)
        steps = self.spec.algorithm.steps
        event = JobProgressed(job=self.job, step=evaluation.step, steps=steps, evaluation=evaluation)
        await self._tell(topology.JOB_PROGRESS, event, f"{self.job}/evaluation/{evaluation.step}")

    async def _tell(self, channel: topology.Channel[Any], event: Any, msg_id: str) -> None:
        """Publish an event. A job does not stop because nobody can be told of it."""
        try:
            await self._node.bus.publish(channel, event, msg_id=msg_id, job=self.job)
        except MeshError as error:
            log.warning("event of job %s was not published: %s", self.job, error)
