"""What a score is made of, as pure functions: what a reward sees, how parts are weighed, what counts as a number."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.reward.api import PlayedEpisode, Reward
from shared.contracts.episodes import Episode, RewardSpec, ScoreGroup, Task
from shared.errors import MeshError, UserError

MIXTURE = "weighted"
"""The reward that is a weighted sum of others."""


@dataclass(frozen=True)
class Part:
    """One reward with its parameters."""

    name: str
    component: str
    """Its name among the parts of a mixture."""
    weight: float
    reward: Reward
    params: Mapping[str, Any]

    def score(self, episode: PlayedEpisode) -> float:
        """Call the reward. Raise `UserError` that names it if it fails or gives no finite number."""
        return finite(self.name, guarded(self.name, self.reward, episode, **self.params))


@dataclass(frozen=True)
class Scorer:
    """A reward as a job names it."""

    parts: Sequence[Part]
    mixture: bool

    def score(self, episode: PlayedEpisode) -> tuple[float, dict[str, float]]:
        """The reward of an episode, and of a mixture the parts before their weights."""
        components = {part.component: part.score(episode) for part in self.parts}
        total = sum(part.weight * components[part.component] for part in self.parts)
        return finite(MIXTURE if self.mixture else self.parts[0].name, total), components if self.mixture else {}


def guarded(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a reward's code. Raise a `UserError` that names the reward for whatever it raises."""
    try:
        return function(*args, **kwargs)
    except MeshError:
        raise
    except Exception as error:  # other people's code
        raise UserError(f"reward {name!r} raised {type(error).__name__}: {error}") from error


def finite(name: str, value: object) -> float:
    """The value as a float. Raise `UserError` if it is not a finite number."""
    if isinstance(value, numbers.Real):
        number = float(value)
        if math.isfinite(number):
            return number
    raise UserError(f"reward {name!r} gave {value!r:.200}: a reward must be a finite number")


def component_names(names: Sequence[str]) -> list[str]:
    """Names of a mixture's parts; one that comes again is numbered: `regex`, `regex_2`."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def played(group: ScoreGroup, episode: Episode) -> PlayedEpisode:
    """What a reward may see of an episode."""
    return PlayedEpisode(
        task=group.task or Task(question=""),
        reply=episode.reply,
        messages=episode.messages,
        turns=len(episode.turns),
        tokens=sum(len(turn.tokens) for turn in episode.turns),
        truncated=bool(episode.turns) and episode.turns[-1].stop_reason == "length",
        environment_reward=episode.environment_reward,
    )


def too_slow(spec: RewardSpec, where: str) -> UserError:
    """What to tell of a reward that ran out of time."""
    return UserError(
        f"{where}: reward {spec.name!r} was not done in timeout_s = {spec.timeout_s:g} s: raise timeout_s, or mend "
        "what hangs"
    )
