"""An environment and a reward of one's own: spell a word backwards, with a second try.

`ReverseWords` puts the tasks and leads the conversation; `nearly` judges the last reply, with partial credit, so that
a policy that never gets a whole word right at first still has something to learn from.
"""

from difflib import SequenceMatcher

from services.environment.api import Environment, EnvironmentParams, Message, Play, Split, Step, Task, UserError
from services.reward.api import PlayedEpisode

WORDS = ("apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket", "kitten",
    "ladder", "market", "needle", "orange", "pencil")  # fmt: skip


class ReverseParams(EnvironmentParams):
    """What a job may set under `environment.params`. A misspelt or mistyped field is named to the user."""

    words: tuple[str, ...] = WORDS
    held_out: int = 4
    """Words kept for evaluation: the last ones."""


class ReverseWords(Environment[ReverseParams]):
    """One word a task, two tries an episode."""

    Params = ReverseParams
    max_turns = 2

    def __init__(self, params: ReverseParams) -> None:
        """Raise `UserError` if nothing is left to train on."""
        super().__init__(params)
        cut = len(params.words) - params.held_out
        if cut < 1:
            raise UserError(f"{len(params.words)} words with {params.held_out} held out leave none: give more words")
        self._words: dict[Split, tuple[str, ...]] = {"train": params.words[:cut], "held_out": params.words[cut:]}

    def size(self, split: Split) -> int:
        """The service goes through all of them in an order that the job's seed shuffles."""
        return len(self._words[split])

    def task(self, split: Split, index: int, seed: int) -> Task:
        """The same for the same arguments, always."""
        word = self._words[split][index]
        return Task(question=f"Spell '{word}' backwards. Reply with the letters only.", answer=word[::-1])

    def step(self, play: Play, reply: str) -> Step:
        """Give a second try after a wrong reply."""
        if reply.strip() == play.task.answer:
            return Step(done=True)
        return Step(done=False, messages=[Message(role="user", content="Not quite. Try again.")])


def nearly(episode: PlayedEpisode, *, first_try: float = 0.25) -> float:
    """How much of the answer the last reply holds in order, and `first_try` more for getting it right at once."""
    answer = episode.task.answer or ""
    likeness = SequenceMatcher(a=answer, b=episode.reply.strip(), autojunk=False).ratio()
    return likeness + (first_try if likeness == 1.0 and episode.turns == 1 else 0.0)
