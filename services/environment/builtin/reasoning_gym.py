"""Any data set of the package `reasoning_gym` by name: about a hundred families of generated tasks.

The data set's own judgement (`score_answer`, 0 to 1, often with partial credit) is the environment's reward. The data
set is generated from a fixed seed, not from the job's, so that all jobs with the same parameters are evaluated on the
same tasks; the job's seed shuffles the training tasks. Small families repeat themselves: a training task whose
question is also a held-out one is passed over for the next that is not.
"""

from __future__ import annotations

import difflib
import logging
import re
from functools import lru_cache
from typing import Annotated, Any

import msgspec

from services.environment.api import (
    Environment,
    EnvironmentParams,
    Message,
    Play,
    Split,
    Step,
    Task,
    UserError,
)

log = logging.getLogger(__name__)

PASSED_OVER = 1000
"""Training tasks in a row that may be held-out questions before the family counts as too small."""


class ReasoningGymParams(EnvironmentParams):
    """Which data set, and how its questions are put."""

    dataset: str
    """For instance `leg_counting`."""
    config: dict[str, Any] = {}
    """The data set's own parameters, for instance `{"max_animals": 4}`; `seed` and `size` are set here instead."""
    size: Annotated[int, msgspec.Meta(ge=1)] = 1000
    """Training tasks."""
    held_out: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Tasks for evaluation, kept apart from them."""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    """Of the generator."""
    template: str = "{question}"
    """What the policy is asked; `{question}` stands for the data set's question."""
    system: str | None = None
    """System message. None: none."""
    answer_tag: Annotated[str, msgspec.Meta(pattern=r"^\w+$")] | None = None
    """The answer is what stands between `<TAG>` and `</TAG>`, the last time. None: it is the whole reply."""


class ReasoningGym(Environment[ReasoningGymParams]):
    """One question, one reply, judged by the data set."""

    Params = ReasoningGymParams

    def __init__(self, params: ReasoningGymParams) -> None:
        """Raise `UserError` for an unknown data set, and for parameters that it refuses."""
        super().__init__(params)
        if "{question}" not in params.template:
            raise UserError(f"environment 'reasoning_gym': template {params.template!r} does not hold {{question}}")
        self._data = _data_set(params)
        # Some families take a second for a task, and all episodes of a group ask for the same one.
        self._entry = lru_cache(maxsize=256)(self._data.__getitem__)
        self._held_out_questions = frozenset(self._data[place]["question"] for place in range(params.held_out))

    def size(self, split: Split) -> int:
        """See `Environment.size`."""
        return self.params.held_out if split == "held_out" else self.params.size

    def task(self, split: Split, index: int, seed: int) -> Task:
        """See `Environment.task`."""
        place = index if split == "held_out" else self._training_place(index)
        entry = self._entry(place)
        answer = entry["answer"]
        return Task(
            question=self.params.template.replace("{question}", entry["question"]),
            answer=None if answer is None else str(answer),
            metadata={"dataset": self.params.dataset, "index": place},
        )

    def start(self, task: Task) -> list[Message]:
        """See `Environment.start`."""
        system = [Message(role="system", content=self.params.system)] if self.params.system else []
        return [*system, Message(role="user", content=task.question)]

    def step(self, play: Play, reply: str) -> Step:
        """See `Environment.step`."""
        entry = self._entry(play.task.metadata["index"])
        return Step(done=True, reward=self._score(_answer(reply, self.params.answer_tag), entry))

    def _score(self, answer: str | None, entry: dict[str, Any]) -> float:
        try:
            return float(self._data.score_answer(answer, entry))
        except Exception as error:
            # prime_factorization and a few others raise on an answer that has not their form: it is a wrong answer.
            log.debug("%s cannot judge %r: %r", self.params.dataset, answer, error)
            return 0.0

    def _training_place(self, index: int) -> int:
        for step in range(PASSED_OVER):
            place = self.params.held_out + (index + step) % self.params.size
            if self._entry(place)["question"] not in self._held_out_questions:
                return place
        raise UserError(
            f"environment 'reasoning_gym': {PASSED_OVER} training tasks of {self.params.dataset!r} in a row are "
            "held-out questions: widen its config, or lower held_out"
        )


def _data_set(params: ReasoningGymParams) -> Any:
    try:
        # Seconds of import, paid by those who use it.
        import reasoning_gym  # noqa: PLC0415
        from reasoning_gym.factory import DATASETS  # noqa: PLC0415
    except ImportError as error:
        raise UserError(f"environment 'reasoning_gym' needs the package reasoning-gym ({error}): install it") from None
    if params.dataset not in DATASETS:
        close = difflib.get_close_matches(params.dataset, list(DATASETS), n=5, cutoff=0.4)
        hint = f"the closest of its {len(DATASETS)} are {', '.join(close)}" if close else "see its list of data sets"
        raise UserError(f"environment 'reasoning_gym': data set {params.dataset!r} is unknown: {hint}")
    if taken := sorted({"seed", "size"} & set(params.config)):
        raise UserError(f"environment 'reasoning_gym': set {' and '.join(taken)} beside config, not in it")
    size = params.held_out + params.size
    try:
        return reasoning_gym.create_dataset(params.dataset, seed=params.seed, size=size, **params.config)
    except (TypeError, ValueError, AssertionError) as error:  # what data sets raise for their own parameters
        raise UserError(
            f"environment 'reasoning_gym': data set {params.dataset!r} refuses config {params.config} with {size} "
            f"tasks: {error}"
        ) from None


def _answer(reply: str, tag: str | None) -> str | None:
    if tag is None:
        return reply.strip()
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", reply, flags=re.DOTALL)
    return found[-1].strip() if found else None
