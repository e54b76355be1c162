"""What the reward service and its scoring processes say to each other: frames of MessagePack over pipes.

    process → service   Hello                           once, when all plugins are loaded
    service → process   Prepare                         is there such a reward, with such parameters?
    process → service   Ready | Refused
    service → process   Check                           everything that is wrong with such a reward
    process → service   Checked | Refused
    service → process   Score                           one episode
    process → service   Scored | Refused

A frame is its length in four bytes, least significant first, and then the message.
"""

from __future__ import annotations

import struct
from typing import Any

from services.reward.api import PlayedEpisode
from shared import wire
from shared.contracts.base import Contract, Failure
from shared.contracts.jobs import FieldError

LENGTH = struct.Struct("<I")


class Hello(Contract, tag_field="kind", tag="hello"):
    """What the process can score."""

    names: list[str]
    broken: dict[str, str] = {}


class Prepare(Contract, tag_field="kind", tag="prepare"):
    """Check a reward's name and parameters."""

    reward: str
    params: dict[str, Any] = {}


class Ready(Contract, tag_field="kind", tag="ready"):
    """They are right."""


class Check(Contract, tag_field="kind", tag="check"):
    """Find everything that is wrong with a reward's name and parameters."""

    reward: str
    params: dict[str, Any] = {}
    path: str = "reward"
    """Where it stands in the job."""


class Checked(Contract, tag_field="kind", tag="checked"):
    """What was found."""

    errors: list[FieldError] = []


class Score(Contract, tag_field="kind", tag="score"):
    """Score one episode."""

    reward: str
    episode: PlayedEpisode
    params: dict[str, Any] = {}


class Scored(Contract, tag_field="kind", tag="scored"):
    """The outcome."""

    reward: float
    components: dict[str, float] = {}


class Refused(Contract, tag_field="kind", tag="refused"):
    """No outcome, and why."""

    failure: Failure


Question = Prepare | Check | Score
Answer = Hello | Ready | Checked | Scored | Refused


def frame(message: Question | Answer) -> bytes:
    """A message with its length before it."""
    body = wire.encode(message, json=False)
    return LENGTH.pack(len(body)) + body
