"""More requests than places, requests that are cancelled, and owners that share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.contracts.sampling import SampleResult
from shared.errors import TemporaryError, UserError
from tests.engines.sampler_tools import PROMPTS, StartAny, ask, continued, eventually, together, tokens
from tests.engines.tiny import CONTEXT


class Crowd:
    """Nobody waits for ever, and nobody is held up by others for long."""

    async def test_more_sequences_than_places_wait_and_finish(self, start: StartAny) -> None:
        engine = await start(max_sequences=4)
        seen: list[int] = []

        async def watch() -> None:
            while True:
                seen.append(engine.load().running)
                await asyncio.sleep(0)

        watcher = asyncio.create_task(watch())
        asked = [ask(PROMPTS[at % 5], num_samples=1 + at % 4, max_tokens=10) for at in range(20)]
        results = await together(engine, asked)
        watcher.cancel()
        assert [len(result.sequences) for result in results] == [request.num_samples for request in asked]
        assert max(seen) <= 4
        assert results[-1].queue_seconds > 0
        assert results[-1].seconds > 0

    async def test_a_short_request_overtakes_a_long_one_that_already_runs(
        self, start: StartAny, reference: Any
    ) -> None:
        engine = await start()
        long = asyncio.create_task(engine.generate(ask(PROMPTS[0], max_tokens=CONTEXT - 1)))
        await eventually(lambda: engine.load().running == 1)
        short = await engine.generate(ask(PROMPTS[3], max_tokens=3, temperature=0))
        assert not long.done()
        assert tokens(short) == continued(reference, PROMPTS[3], 3)
        long.cancel()

    async def test_cancelling_frees_the_place_for_those_who_wait(self, start: StartAny, reference: Any) -> None:
        engine = await start(max_sequences=3)
        endless = [asyncio.create_task(engine.generate(ask(PROMPTS[0], max_tokens=1000))) for _ in range(2)]
        waiting = asyncio.create_task(engine.generate(ask(PROMPTS[0], num_samples=3, max_tokens=1000)))
        await eventually(lambda: engine.load().running == 2 and engine.load().waiting == 3)
        later = asyncio.create_task(engine.generate(ask(PROMPTS[3], num_samples=2, temperature=0)))
        waiting.cancel()
        endless[0].cancel()
        result = await later
        assert result.sequences[0].tokens.tolist() == continued(reference, PROMPTS[3], 8)
        assert not endless[1].done()
        endless[1].cancel()
        await eventually(lambda: engine.load().running == engine.load().waiting == 0)
        assert [task.cancelled() for task in (*endless, waiting)] == [True, True, True]

    async def test_a_decoder_that_raises_fails_only_its_own_request(self, start: StartAny) -> None:
        def cursed(tokens: Sequence[int]) -> str:
            raise ValueError(f"cannot decode {len(tokens)} tokens")

        engine = await start(decode=cursed)
        failed, fine = await asyncio.gather(
            engine.generate(ask(PROMPTS[0], stop=["x"])), engine.generate(ask(PROMPTS[1])), return_exceptions=True
        )
        assert "cannot decode" in str(failed)
        assert isinstance(fine, SampleResult)

    async def test_stopping_cancels_what_runs_and_what_waits(self, start: StartAny) -> None:
        engine = await start(max_sequences=1)
        tasks = [asyncio.create_task(engine.generate(ask(PROMPTS[0], max_tokens=1000))) for _ in range(2)]
        await eventually(lambda: engine.load().running == 1)
        await engine.stop()
        await engine.stop()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [True, True]
        with pytest.raises(TemporaryError, match="not running"):
            engine.check(ask(PROMPTS[0]))

    async def test_a_model_that_is_not_there_is_a_users_error(self, start: StartAny, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="does not exist"):
            await start(tmp_path / "nowhere")

    async def test_owners_are_served_in_turn_however_much_each_asks_for(self, start: StartAny) -> None:
        engine = await start(max_sequences=2)
        ended: list[str] = []

        async def one(owner: str) -> None:
            await engine.generate(ask(PROMPTS[0], num_samples=2, max_tokens=20, owner=owner))
            ended.append(owner)

        crowd = [asyncio.create_task(one("many")) for _ in range(30)]
        await eventually(lambda: engine.load().running == 2)
        await asyncio.gather(*(one(owner) for owner in ("few", "few", "single")))
        first = ended.index("few")
        assert abs(ended.index("single") - first) == 1, ended
        assert ended[first : ended.index("few", first + 1)].count("many") <= 1, ended
        assert ended.count("many") < 25, ended
        await asyncio.gather(*crowd)
