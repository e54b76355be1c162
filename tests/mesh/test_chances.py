"""Messages whose handler ends its process: given up after a few chances, without harm to those beside them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.local.nats_server import NatsServer
from shared import topology
from shared.bus import Bus, Delivery
from shared.chances import Chances, TooOften
from shared.contracts.episodes import PlayGroup
from shared.contracts.results import DeliveryMark
from shared.errors import PermanentError, TemporaryError
from tests.mesh import deadly
from tests.mesh.harness import eventually
from tests.mesh.playing import group, publish

Message = Delivery[PlayGroup]


def delivery(number: int, seq: int = 1) -> Message:
    return Delivery(group("moody"), "subject", seq, deliveries=number)


class Life:
    """One process after the other; each has chances of its own."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._chances = Chances(bus, topology.GROUP_PLAYERS)
        self._inside: set[int] = set()

    async def dies_of(self, *messages: Message) -> None:
        """It takes all of these, begins with those that it may begin with, and ends without a word."""
        begun = [asyncio.create_task(self._hang(message)) for message in messages]
        for message in messages:
            await eventually(lambda message=message: self._begun_or_waiting(message))  # type: ignore[misc]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Chances, "_mark", _nothing)
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
        self._chances = Chances(self._bus, topology.GROUP_PLAYERS)
        self._inside.clear()

    async def _begun_or_waiting(self, message: Message) -> bool | None:
        if message.seq in self._inside:
            return True
        entry = await self._bus.table(topology.DELIVERIES).get(("environment", str(message.seq)))
        waits = entry is not None and entry.value.delivery == message.deliveries and self._chances._alone.locked()
        return True if waits and self._inside else None

    async def _hang(self, message: Message) -> None:
        async with self._chances.given(message):
            self._inside.add(message.seq)
            await asyncio.Event().wait()

    async def handles(self, message: Message, error: Exception | None = None) -> None:
        try:
            async with self._chances.given(message):
                if error:
                    raise error
        except (TemporaryError, PermanentError) as raised:
            if raised is not error:
                raise


async def _nothing(*_: object) -> None:
    """What a process that is gone writes down."""


@pytest.fixture
def life(bus: Bus) -> Life:
    return Life(bus)


async def test_a_message_of_which_three_processes_died_is_not_tried_again(life: Life) -> None:
    for number in (1, 2, 3):
        await life.dies_of(delivery(number))
    with pytest.raises(TooOften, match="ended without a word, 3 times: look in the logs"):
        await life.handles(delivery(4))


async def test_what_is_handed_back_uses_up_no_chance(life: Life) -> None:
    for number in range(1, 20):
        await life.handles(delivery(number), TemporaryError("later"))
    await life.dies_of(delivery(20))
    await life.handles(delivery(21), TemporaryError("later"))
    await life.dies_of(delivery(22))
    await life.handles(delivery(23), TemporaryError("later"))
    await life.handles(delivery(24))


async def test_those_that_were_with_a_deadly_message_survive_it(life: Life) -> None:
    """Three innocent ones are with it each time; the last time it is alone among those under suspicion."""
    for number in (1, 2, 3):
        await life.dies_of(*(delivery(number, seq) for seq in (1, 2, 3, 4)))
    with pytest.raises(TooOften):
        await life.handles(delivery(4, 1))
    for seq in (2, 3, 4):
        await life.handles(delivery(4, seq))


async def test_a_message_that_is_handled_at_once_leaves_no_mark(life: Life, bus: Bus) -> None:
    await life.handles(delivery(1))
    await life.handles(delivery(1, 2), PermanentError("no"))
    assert await bus.table(topology.DELIVERIES).items() == []
    await life.handles(delivery(1, 3), TemporaryError("later"))
    (mark,) = await bus.table(topology.DELIVERIES).items()
    assert (mark.key, mark.value) == (("environment", "3"), DeliveryMark(delivery=1, vanished=0))


async def test_without_chances_the_deliveries_are_counted(bus: Bus) -> None:
    chances = Chances(bus, dataclasses.replace(topology.GROUP_PLAYERS, chances=0))
    async with chances.given(delivery(25)):
        pass
    with pytest.raises(TooOften, match="too often"):
        async with chances.given(delivery(26)):
            pass
    assert await bus.table(topology.DELIVERIES).items() == []


# -- a real process --------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def supervised(config: Path) -> AsyncIterator[list[int]]:
    """Keeps the deadly service running; gives the codes it has ended with."""
    codes: list[int] = []
    process: asyncio.subprocess.Process | None = None

    async def keep() -> None:
        nonlocal process
        while True:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.mesh.deadly", "--config", str(config)
            )
            codes.append(await process.wait())

    keeping = asyncio.create_task(keep())
    yield codes
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    if process is not None and process.returncode is None:
        process.kill()
        await process.wait()


async def test_a_group_that_ends_the_process_each_time_fails_with_the_reason(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    config = tmp_path / "environment.toml"
    config.write_text(
        f'nats_url = "{nats_server.url}"\nblob_url = "{tmp_path / "blobs"}"\n'
        'plugins = ["deadly=tests.mesh.deadly:deadly"]\n'
    )
    await publish(bus, group("deadly", 0))
    await publish(bus, group("deadly", 1))
    failures = {}
    async with supervised(config) as codes, asyncio.timeout(60):
        async for back in bus.follow(topology.SCORED):
            assert back.message.failure is not None
            failures[back.message.group.index] = back.message.failure.message
            if len(failures) == 2:
                break
        assert codes == [deadly.EXIT_CODE] * 3
    assert "whoever took it ended without a word, 3 times" in failures[0]
    assert "no tokenizer" in failures[1], "it was played, as far as that went without a model"
