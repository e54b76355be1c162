"""What the environment service decides, as pure functions: which task, which seed, which prompt, which reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from services.environment.api import Play, Step
from services.environment.shuffle import digest, permuted
from shared.contracts.episodes import EnvironmentSpec, GroupKey, Message, PlayGroup, Split
from shared.errors import UserError

SEEDS = 2**31


def task_number(environment: str, size: int | None, key: GroupKey, seed: int) -> int:
    """The task that a group is about.

    Training goes through all tasks in a shuffled order, without repeating one, and then through all in another.
    Evaluation takes them as they come, so that it asks the same at every step. Raise `UserError` if there is none.
    """
    if size is None:
        return key.index
    if size < 1:
        raise UserError(
            f"environment {environment!r} has no {key.split} tasks with these parameters: widen them, or "
            + ("set evaluation.tasks to 0" if key.split == "held_out" else "take fewer held-out tasks")
        )
    if key.split == "train":
        epoch, position = divmod(key.index, size)
        return permuted(position, size, f"{seed}/{epoch}")
    if key.index >= size:
        raise UserError(
            f"environment {environment!r} has {size} held-out tasks, and number {key.index} was asked for: "
            f"set evaluation.tasks to {size} or less"
        )
    return key.index


def request_seed(group: PlayGroup, episode: int | None, turn: int) -> int:
    """The seed of one request for samples: a job with a seed draws the same again, and no two requests draw alike.

    `episode` is None for the first turn, in which one request serves all episodes.
    """
    seed = group.task_seed if group.sampling.seed is None else group.sampling.seed
    return digest(f"{seed}/{group.group}/{'all' if episode is None else episode}/{turn}") % SEEDS


def answered(messages: Sequence[Message], reply: str) -> tuple[Message, ...]:
    """The conversation with the policy's reply; one that the environment began for it is gone on with."""
    if messages and messages[-1].role == "assistant":
        return (*messages[:-1], Message(role="assistant", content=messages[-1].content + reply))
    return (*messages, Message(role="assistant", content=reply))


def next_prompt(
    prompt: Sequence[int],
    tokens: Sequence[int],
    before: Sequence[int],
    hollow: Sequence[int],
    anew: Callable[[], list[int]],
) -> list[int]:
    """The prompt of the next turn: what the policy saw, exactly what it said, and what the template puts behind.

    The policy's own tokens are kept as they were sampled. To decode and encode them again would often give others,
    and training would then judge tokens that nobody drew; it would also lose the sampler's cached prefix. What the
    template puts behind a reply is found as a difference of renderings: `before` ends where the reply begins, and
    `hollow` is the conversation up to the next reply with an empty one in its place. If `hollow` does not begin with
    `before`, the template rewrites what came earlier, and nothing is left but to render everything `anew`.
    """
    if list(hollow[: len(before)]) != list(before):
        return anew()
    behind = list(hollow[len(before) :])
    if tokens and behind and tokens[-1] == behind[0]:
        behind = behind[1:]  # the policy ended its turn itself, with the token that the template would add
    return [*prompt, *tokens, *behind]


def checked_step(environment: str, step: object, turn: int) -> Step:
    """The step itself. Raise `UserError` that says what is wrong with what an environment returned."""
    where = f"environment {environment!r} in turn {turn}"
    if not isinstance(step, Step):
        raise UserError(f"{where} returned {step!r:.200}: step() must return a Step")
    if not step.done and not step.messages:
        raise UserError(f"{where} neither ended the episode nor said anything: give a message, or done=True")
    for message in step.messages:
        if not isinstance(message, Message) or message.role == "assistant":
            raise UserError(f"{where} gave the message {message!r:.200}: its messages are Message from user or system")
    if step.reward is not None and not _finite(step.reward):
        raise UserError(f"{where} gave the reward {step.reward!r:.200}: a finite number or None is needed")
    return step


def checked_opening(environment: str, opening: object) -> tuple[Message, ...]:
    """The messages themselves. Raise `UserError` if they are none."""
    if not isinstance(opening, Sequence) or not opening or not all(isinstance(item, Message) for item in opening):
        raise UserError(
            f"environment {environment!r} opened with {opening!r:.200}: start() must return a list of at least one "
            "Message"
        )
    return tuple(opening)


def checked_size(environment: str, split: Split, size: object) -> int | None:
    """The size itself. Raise `UserError` if it is none."""
    if size is None or (isinstance(size, int) and size >= 0):
        return size
    raise UserError(
        f"environment {environment!r} has the size {size!r:.200} for {split}: it must be 0 or more, or None"
    )


def total(so_far: float | None, step: Step) -> float | None:
    """An episode's own reward: the sum over the steps that gave one. None if none did."""
    if step.reward is None:
        return so_far
    return float(step.reward) + (so_far or 0.0)


def over(step: Step, play: Play, max_turns: int) -> bool:
    """Whether a step was the last of its episode."""
    return step.done or play.turn + 1 >= max_turns


def too_slow(spec: EnvironmentSpec, where: str) -> UserError:
    """What to tell of an episode that ran out of time."""
    return UserError(
        f"environment {spec.name!r} was not done in episode_timeout_s = {spec.episode_timeout_s:g} s (it was {where}): "
        "raise episode_timeout_s, or mend what hangs"
    )


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
