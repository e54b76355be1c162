"""Answers on the RESULTS stream. A request always gets one: what it asked for, or why not."""

from __future__ import annotations

from shared.contracts.base import Contract, Failure
from shared.contracts.checks import CheckAnswer
from shared.contracts.jobs import JobAnswer
from shared.contracts.sampling import SampleResult
from shared.contracts.training import OperationResult


class RequestFailed(Contract, tag_field="kind", tag="failed"):
    """Nothing came of the request."""

    request_id: str
    failure: Failure


Result = OperationResult | SampleResult | JobAnswer | CheckAnswer | RequestFailed


class ResultTiming(Contract):
    """A `Result`, read for when it was worked on."""

    kind: str
    request_id: str
    op: str = ""
    submitted: float = 0.0
    queue_seconds: float = 0.0
    seconds: float = 0.0
    failure: Failure | None = None


class DeliveryMark(Contract):
    """What is known of the deliveries of a message that was given out more than once."""

    delivery: int
    """The one that wrote this."""
    vanished: int
    """How many, this one included while it is in work, ended without a word."""


class DeadLetter(Contract):
    """A message that could not be handled, kept with its reason."""

    stream: str
    subject: str
    reason: str
    deliveries: int
    body: bytes
    headers: dict[str, str] = {}
