"""Answers on their way: sent until they are stored, without anybody waiting for that but a snapshot."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from shared.bus import Delivery
from shared.contracts.results import Result
from shared.contracts.training import AnyOperation, Operation, OperationResult
from shared.errors import TemporaryError
from shared.node import Node

log = logging.getLogger(__name__)


class Answers:
    """The answers that are not stored yet, by run."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._unsent: dict[str, set[asyncio.Task[None]]] = {}

    def send(
        self,
        delivery: Delivery[AnyOperation],
        result: Result,
        *,
        again: bool = False,
        told: Callable[[], None] | None = None,
    ) -> None:
        """Answer an operation, in the encoding in which it came, and say which it was and when it came.

        `again`: another trainer may have answered it before. `told` is called once the answer is stored, but not if
        there was one before.
        """
        if isinstance(result, OperationResult):
            kind = str(type(delivery.message).__struct_config__.tag)
            result = msgspec.structs.replace(result, op=kind, submitted=delivery.time)
        sending = self._send_until_stored(result, json=delivery.json, again=again, told=told)
        task = self._node.tasks.start(f"answer {result.request_id}", sending)
        unsent = self._unsent.setdefault(delivery.message.run, set())
        unsent.add(task)
        task.add_done_callback(unsent.discard)

    async def settled(self, run: str) -> None:
        """Wait until all answers of a run are stored."""
        if unsent := self._unsent.get(run):
            await asyncio.wait(set(unsent))

    async def _send_until_stored(
        self, result: Result, *, json: bool, again: bool, told: Callable[[], None] | None
    ) -> None:
        while True:
            try:
                if again and await self._node.bus.answer_of(result.request_id) is not None:
                    return
                await self._node.bus.answer(result, json=json)
                break
            except TemporaryError as error:
                log.warning("answer %s waits: %s", result.request_id, error, extra={"request": result.request_id})
                await asyncio.sleep(error.delay)
        if told is not None:
            told()


def result_of(operation: Operation, **filled: Any) -> OperationResult:
    """The result of an operation, with the fields that its kind fills."""
    names: dict[str, Any] = {
        "request_id": operation.request_id,
        "run": operation.run,
        "seq": operation.seq,
        "note": operation.note,
    }
    return OperationResult(**names, **filled)
