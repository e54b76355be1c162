"""Asks for a job's groups, a window of them at a time, so that one job floods neither the bus nor the queues."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from services.coordinator.config import CoordinatorConfig
from services.coordinator.records import Records
from services.coordinator.requests import held_out_group, training_group
from services.coordinator.window import Window
from shared import topology
from shared.bus import Bus
from shared.contracts.episodes import GroupKey, PlayGroup

Wanted = Callable[[GroupKey], bool]

AT_ONCE = 16
"""Groups of one job that are being published at the same time."""


class Asking:
    """The groups of one job that are to be asked for, and those that are out."""

    def __init__(self, bus: Bus, records: Records, config: CoordinatorConfig, publishing: asyncio.Semaphore) -> None:
        """`publishing` bounds what all jobs publish at the same time."""
        self._bus = bus
        self._records = records
        self._publishing = publishing
        self._patience_s = config.group_patience_s
        self._training = Window(config.group_window)
        self._held_out = Window(config.evaluation_window)

    def add_training(self, indexes: Iterable[int]) -> None:
        """Ask for these, as soon as there is room."""
        self._training.add(GroupKey(split="train", index=index) for index in indexes)

    def add_evaluation(self, step: int) -> None:
        """Ask for the tasks of an evaluation, as soon as there is room."""
        tasks = range(self._records.spec.evaluation.tasks)
        self._held_out.add(GroupKey(split="held_out", index=index, round=step) for index in tasks)

    def back(self, key: GroupKey) -> None:
        """A group has come back."""
        (self._held_out if key.split == "held_out" else self._training).back(key)

    def lost(self) -> list[GroupKey]:
        """Groups that have been out for too long; they count as out no more."""
        now = time.monotonic()
        return [key for window in (self._training, self._held_out) for key in window.overdue(now, self._patience_s)]

    def next(self, training: Wanted, held_out: Wanted) -> list[Sequence[PlayGroup]]:
        """What there is room for, of what is still wanted, in portions for `publish`."""
        record, now = self._records.record, time.monotonic()
        plans = {plan.step: plan for plan in record.evaluating}
        groups = [training_group(record, key) for key in self._training.next(now, training)]
        groups += [held_out_group(record, plans[key.round], key.index) for key in self._held_out.next(now, held_out)]
        return [groups[start : start + AT_ONCE] for start in range(0, len(groups), AT_ONCE)]

    async def publish(self, groups: Sequence[PlayGroup]) -> None:
        """Publish these, however long the bus is away."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in groups:
                    tasks.create_task(self._publish(group))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _publish(self, group: PlayGroup) -> None:
        async def publish() -> int:
            async with self._publishing:
                msg_id = f"{group.job}/{group.group}"
                name = group.environment.name
                return await self._bus.publish(topology.GROUPS, group, msg_id=msg_id, environment=name)

        await self._records.patience(publish)
