"""How often a message may be given out, told apart by how its earlier deliveries ended.

    handed back, on purpose   as often as its consumer allows; the server counts these
    vanished                  `chances` times: whoever had taken it ended without a word, most likely because of it

A process that ends takes all that it was working on with it, the guilty message and the others. So a message is played
beside others as long as it has more than one chance left, and the last time alone among such messages: then only the
guilty one uses up its last chance. Nothing is written down about a message that is handled at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from shared import topology
from shared.bus import Bus, Delivery
from shared.contracts.results import DeliveryMark
from shared.errors import MeshError, PermanentError
from shared.topology import Consumer

T = TypeVar("T")
log = logging.getLogger(__name__)


class TooOften(PermanentError):
    """A message is not tried again, whatever its handler would do."""


class Chances:
    """The chances of the messages of one consumer, in one process."""

    def __init__(self, bus: Bus, consumer: Consumer[Any]) -> None:
        self._consumer = consumer
        self._table = bus.table(topology.DELIVERIES)
        self._alone = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def given(self, delivery: Delivery[T]) -> AsyncIterator[None]:
        """Handle a message inside. Raise `TooOften` if it has had all its chances."""
        chances = self._consumer.chances
        vanished = await self._vanished(delivery) if chances and delivery.deliveries > 1 else 0
        if chances and vanished >= chances:
            raise TooOften(
                f"whoever took it ended without a word, {vanished} times: look in the logs for what ends the process, "
                "or uses up its memory"
            )
        if delivery.deliveries > self._consumer.temporary_deliveries:
            raise TooOften("it was given out too often: whoever took it may have died of it each time")
        async with self._begun(delivery, vanished):
            try:
                yield
            except PermanentError:
                raise
            except BaseException:  # it is handed back, and has not vanished
                await self._mark(delivery, vanished)
                raise

    @contextlib.asynccontextmanager
    async def _begun(self, delivery: Delivery[T], vanished: int) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if 0 < vanished == self._consumer.chances - 1:
                await self._mark(delivery, vanished)  # while it waits, it is not to blame
                await stack.enter_async_context(self._alone)
            if vanished:
                await self._mark(delivery, vanished + 1)
            yield

    async def _vanished(self, delivery: Delivery[T]) -> int:
        entry = await self._table.get(self._key(delivery))
        mark = entry.value if entry else DeliveryMark(delivery=0, vanished=0)
        # A delivery that left no mark has vanished. However many there are, they count once: a message leaves none
        # before it is under suspicion.
        return mark.vanished + (delivery.deliveries > mark.delivery + 1)

    async def _mark(self, delivery: Delivery[T], vanished: int) -> None:
        if not self._consumer.chances:
            return
        try:
            await self._table.put(
                self._key(delivery), DeliveryMark(delivery=delivery.deliveries, vanished=vanished)
            )  # fmt: skip
        except MeshError as error:
            log.warning("a delivery of %s was not marked: %s", delivery.subject, error)

    def _key(self, delivery: Delivery[T]) -> tuple[str, str]:
        return self._consumer.name, str(delivery.seq)
