r"""Answers that are numbers: finding one in a reply, and comparing two by value.

Plain numbers and fractions are compared exactly, without any library. Only what is neither (roots, expressions, what
LaTeX a `\boxed{}` may hold) goes to `math-verify`, and only in a short form: over a long one it can take for ever.
"""

from __future__ import annotations

import logging
import re
import threading
from fractions import Fraction

from services.reward.api import UserError

LONGEST = 200
"""Characters of an expression that is given to math-verify."""
MOST_DIGITS = 4000
"""Python itself refuses to read whole numbers of more than 4,300 digits."""
SECONDS = 3
"""For math-verify to read or compare once; then the answer counts as wrong."""

_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
_PLAIN = re.compile(
    # A minus is a sign only where nothing stands that it could be taken away from: "5-3" ends in 3, "= -3" in -3.
    r"(?:(?<![\w.)%}\]])(?P<sign>[-+−])|(?<![\w.]))"  # noqa: RUF001 - models write the real minus, too
    rf"(?:(?P<top>{_NUMBER})(?:\s?/\s?(?P<bottom>{_NUMBER}))?"
    rf"|\\[dt]?frac\s?{{\s?(?P<over>{_NUMBER})\s?}}\s?{{\s?(?P<under>{_NUMBER})\s?}})"
    r"(?P<percent>\s?\\?%)?"
)
_BOXED = "\\boxed{"


def final_answer(reply: str) -> str | None:
    r"""What the last `\boxed{}` of a reply holds; without one, its last number; None if there is neither."""
    if (boxed := _boxed(reply)) is not None:
        return boxed
    last = None
    for last in _PLAIN.finditer(reply):  # noqa: B007 - the last one is wanted
        pass
    return last.group() if last else None


def same_value(found: str, answer: str, tolerance: float) -> bool:
    """Whether two written numbers or expressions have the same value (see `builtin.numeric`)."""
    expected = _bare(_boxed(answer) or answer)
    given = _bare(found)
    if given == expected:
        return True
    mine, theirs = _value(given), _value(expected)
    if mine is None or theirs is None:
        return _verified(given, expected)
    if _close(mine, theirs, tolerance):
        return True
    # "50%" answers both a question after 0.5 and one after a percentage of 50.
    percent = given.endswith("%"), expected.endswith("%")
    factor = {(True, False): Fraction(100), (False, True): Fraction(1, 100)}.get(percent)
    return factor is not None and _close(mine * factor, theirs, tolerance)


def _close(mine: Fraction, theirs: Fraction, tolerance: float) -> bool:
    if mine.denominator == theirs.denominator == 1:
        return mine == theirs
    return abs(mine - theirs) <= Fraction(tolerance) * abs(theirs)


def _value(text: str) -> Fraction | None:
    """The value of a plain number or fraction; None for anything else."""
    found = _PLAIN.fullmatch(text)
    if not found or len(text) > MOST_DIGITS:
        return None
    top = Fraction((found["top"] or found["over"]).replace(",", ""))
    bottom = Fraction((found["bottom"] or found["under"] or "1").replace(",", ""))
    if not bottom:
        return None
    value = top / bottom / (100 if found["percent"] else 1)
    return value if found["sign"] in (None, "+") else -value


def _boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return None


def _bare(text: str) -> str:
    return text.strip().strip("$").strip()


def _verified(given: str, expected: str) -> bool:
    if max(len(given), len(expected)) > LONGEST:
        return False
    try:
        import math_verify  # noqa: PLC0415 - most answers are plain numbers, which do without
    except ImportError as error:
        raise UserError(f"reward 'numeric' needs the package math-verify for {expected!r} ({error})") from None
    # It is silent about a limit of None but for one warning, and signals work in the main thread only.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    limit = SECONDS if threading.current_thread() is threading.main_thread() else None
    gold, target = (math_verify.parse(f"${text}$", parsing_timeout=limit) for text in (expected, given))
    return bool(math_verify.verify(gold, target, timeout_seconds=limit))
