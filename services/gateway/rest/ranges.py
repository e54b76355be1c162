"""Ranges of bytes, as a client may ask for them (RFC 9110, section 14). Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from services.gateway.errors import NotSatisfiable

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Span(NamedTuple):
    """Bytes from `begin` up to, not including, `end`."""

    begin: int
    end: int


def asked(header: str, size: int) -> Span | None:
    """What a `Range` header asks for of `size` bytes; None: all, as also for what is not understood.

    Raise `NotSatisfiable` for a range that begins behind the end.
    """
    found = _RANGE.fullmatch(header.strip())
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found[1], found[2]
    if not first:
        return _within(size - int(last), size, size) if int(last) else _within(size, size, size)
    if last and int(last) < int(first):
        return None
    return _within(int(first), int(last) + 1 if last else size, size)


def _within(begin: int, end: int, size: int) -> Span:
    if begin >= size:
        raise NotSatisfiable(f"the file has {size} bytes: ask for a range within them", size)
    return Span(max(begin, 0), min(end, size))
