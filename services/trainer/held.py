"""What a trainer keeps of one run that it holds, beside what its engine has."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from services.trainer.backlog import Backlog
from services.trainer.policy import tokens_of
from services.trainer.residency import Level
from shared.bus import Delivery
from shared.contracts.training import AnyOperation, RunRecord
from shared.errors import MeshError


@dataclass(eq=False)
class HeldRun:
    """A run whose lease this trainer has."""

    record: RunRecord
    revision: int
    backlog: Backlog[Delivery[AnyOperation]]
    data_done: int = 0
    """How many data of the head have been through passes."""
    level: Level = Level.NOWHERE
    size: int = 0
    """Bytes of its state when it last came to the device."""
    used_at: float = field(default_factory=time.monotonic)
    """Monotonic time of its last operation."""
    broken: MeshError | None = None
    """Why it cannot be worked on; every operation is answered with this."""
    done_since_snapshot: int = 0
    snapshot_at: float = field(default_factory=time.monotonic)
    not_before: float = 0.0
    """Monotonic time until which its head waits after a temporary error."""
    stuck: tuple[int, float] = (-1, 0.0)
    """The seq that has not come though later ones have, and the monotonic time when that was noticed."""
    reader: asyncio.Task[None] | None = None
    aside: asyncio.Task[None] | None = None
    """Reads or writes files of the run, while the operations of others go on. Its own wait."""
    newest_when_claimed: int = 0
    """Place of the newest operation that was there when the run was claimed. Up to it, others may have answered."""
    room: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when an operation left the backlog."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.record.run

    @property
    def head(self) -> Delivery[AnyOperation]:
        """The operation whose turn it is; there is one."""
        head = self.backlog.head
        assert head is not None, f"nothing waits in run {self.name}"
        return head

    @property
    def may_be_answered(self) -> bool:
        """Whether another trainer may have done the head, and answered it."""
        return self.head.seq <= self.newest_when_claimed

    @property
    def tokens_waiting(self) -> int:
        """Tokens that its backlog still takes through passes."""
        waiting = ((seq, entry[0]) for seq, entry in self.backlog.waiting.items() if entry[0] is not None)
        return sum(
            tokens_of(delivery.message, self.data_done if seq == self.backlog.next_seq else 0)
            for seq, delivery in waiting
        )

    def finish_head(self) -> None:
        """The head has been executed, or refused."""
        self.backlog.done()
        self.data_done = 0
        self.done_since_snapshot += 1
        self.used_at = time.monotonic()
        self.room.set()
