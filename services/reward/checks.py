"""Whether a reward can score with given parameters: asked before a job is accepted, answered by a scoring process."""

from __future__ import annotations

import asyncio

from services.reward.processes import Processes
from services.reward.protocol import Check, Checked, Refused
from shared.bus import Bus, Delivery
from shared.contracts.checks import CheckAnswer, CheckReward
from shared.contracts.jobs import FieldError
from shared.errors import PermanentError

CHECK_SECONDS = 15.0


class Checks:
    """Answers questions about rewards."""

    def __init__(self, bus: Bus, processes: Processes) -> None:
        self._bus = bus
        self._processes = processes

    async def handle(self, delivery: Delivery[CheckReward]) -> None:
        """Answer one question."""
        question = delivery.message
        await self._bus.answer(CheckAnswer(request_id=question.request_id, errors=await self._errors(question)))

    async def _errors(self, question: CheckReward) -> list[FieldError]:
        wrong = f"reward {question.name!r}"
        async with self._processes.lease() as process:
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    answer = await process.ask(Check(reward=question.name, params=question.params, path=question.path))
            except TimeoutError:
                text = f"{wrong} did not check its parameters in {CHECK_SECONDS:g} s: mend what hangs"
                return [FieldError(path=f"{question.path}.params", message=text)]
            except PermanentError as error:
                return [FieldError(path=f"{question.path}.params", message=f"{wrong}: {error}")]
        if isinstance(answer, Refused):
            return [FieldError(path=f"{question.path}.params", message=answer.failure.message)]
        assert isinstance(answer, Checked)
        return answer.errors
