"""Which seq a message of a run's log had that cannot be read as an operation. Pure.

A producer's message id is `run/seq`, which needs no body. Without one, a body may still say its seq: that of a newer
kind of operation, or with a bad field, does. What says neither belongs to no seq: nobody can wait for its result.
"""

from __future__ import annotations

from collections.abc import Mapping

from shared import wire
from shared.contracts.base import Contract
from shared.errors import UserError


class Outline(Contract):
    """What all operations have."""

    run: str
    seq: int


def seq_of(run: str, msg_id: str, body: bytes, headers: Mapping[str, str]) -> int | None:
    """The seq of a message on the log of `run`; None: it does not say."""
    named, _, seq = msg_id.rpartition("/")
    if named == run and seq.isascii() and seq.isdigit():
        return int(seq)
    try:
        outline: Outline = wire.decode(body, Outline, json=wire.is_json(dict(headers), body))
    except UserError:
        return None
    return outline.seq if outline.run == run and outline.seq >= 0 else None
