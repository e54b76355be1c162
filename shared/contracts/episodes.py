"""Groups of episodes on their way: asked for, played, scored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.base import Contract, Failure, Name, Strict
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import SamplingParams, StopReason

Split = Literal["train", "held_out"]
LONGEST_SECONDS = 7 * 86_400.0
"""That an episode, or a score, may be given: as long as messages are kept."""


class EnvironmentSpec(Strict):
    """An environment by its registered name, with its parameters."""

    name: Name
    params: dict[str, Any] = {}
    episode_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=LONGEST_SECONDS)] = 300.0
    """An episode that takes longer fails alone."""


class RewardSpec(Strict):
    """A reward by its registered name, with its parameters. `weighted` mixes others."""

    name: Name
    params: dict[str, Any] = {}
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=LONGEST_SECONDS)] = 30.0
    """For scoring one episode."""


class Message(Contract):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Task(Contract):
    """What an episode is about, fixed by environment, split, seed and index."""

    question: str
    answer: str | None = None
    metadata: dict[str, Any] = {}


class GroupKey(Contract):
    """Names a group within its job for ever; results that come twice are recognised by it."""

    split: Split
    index: int
    """Running number of the group. For `held_out` also the number of the task."""
    round: int = 0
    """`held_out`: the step that the evaluation belongs to. `train`: how often the group was asked for before."""

    def __str__(self) -> str:
        return f"{self.split}.{self.index}.{self.round}"


class PlayGroup(Contract):
    """Play `size` episodes of one task (coordinator to environment)."""

    job: str
    group: GroupKey
    environment: EnvironmentSpec
    reward: RewardSpec
    base_model: str
    sampling: SamplingParams
    size: Annotated[int, msgspec.Meta(ge=1)]
    policy: PolicyRef | None = None
    task_seed: int = 0
    """With the index, fixes the task."""
    reference_logprobs: bool = False
    """Also score the sampled tokens under the base model."""
    isolated: bool = False
    owner: str = "default"


class Turn(Contract):
    """The policy's part in one exchange: it saw `prompt` and said `tokens`."""

    prompt: Int32s
    tokens: Int32s
    logprobs: Float32s
    stop_reason: StopReason
    reference_logprobs: Float32s | None = None


class Episode(Contract):
    """One playthrough. `failure` says why there is nothing to score."""

    turns: list[Turn] = []
    messages: list[Message] = []
    """The whole conversation as text."""
    reply: str = ""
    """The last thing that the policy said, without what the environment may have begun for it."""
    environment_reward: float | None = None
    """What the environment itself gave, for the reward `environment`."""
    failure: Failure | None = None


class ScoreGroup(Contract):
    """Score the played episodes of a group (environment to reward)."""

    job: str
    group: GroupKey
    reward: RewardSpec
    task: Task | None
    episodes: list[Episode]
    policy: PolicyRef | None = None
    play_seconds: float = 0.0
    owner: str = "default"


class Rollout(Contract):
    """A scored episode."""

    turns: list[Turn] = []
    reward: float = 0.0
    components: dict[str, float] = {}
    """Each part of a mixture before its weight."""
    text: str = ""
    """The last thing the policy said, for people to look at."""
    failure: Failure | None = None


class GroupScored(Contract):
    """A group came back (reward to coordinator)."""

    job: str
    group: GroupKey
    rollouts: list[Rollout] = []
    policy: PolicyRef | None = None
    task: Task | None = None
    play_seconds: float = 0.0
    failure: Failure | None = None
    """The group as a whole could not be played or scored."""
