"""What a client is told when something is wrong.

    UserError (400)
    ├── NotFound (404)        also for what belongs to somebody else: who asks must not learn that it is there
    ├── Unauthorized (401)    no key, or one that is not good (any more)
    ├── Forbidden (403)       the key is good, but not for this
    ├── Gone (410)            it is over: clients stop asking, or ask for the sample again
    ├── Late (408)            clients send it again
    ├── TooLarge (413)
    ├── NotSatisfiable (416)  a range of bytes that is not there
    └── TooMany (429)         clients try again after a while
    TemporaryError (503)      clients try again
    anything else (500)       ours

Clients read the text from `error` and from `detail`; `category` says who can mend it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from shared.errors import TemporaryError, UserError


class NotFound(UserError):
    """There is no such thing, or it is not the caller's."""


class Unauthorized(UserError):
    """Who asks is not known."""


class Forbidden(UserError):
    """Who asks may not."""


class Gone(UserError):
    """It was there and is over."""


class Late(UserError):
    """The request did not come in time."""


class TooLarge(UserError):
    """More bytes than are taken."""


class NotSatisfiable(UserError):
    """A range that lies behind the end of a file."""

    def __init__(self, message: str, size: int) -> None:
        """`size`: the file's, in bytes."""
        super().__init__(message)
        self.size = size


class TooMany(UserError):
    """The caller is at a limit."""

    def __init__(self, message: str, *, delay: float = 1.0) -> None:
        """`delay`: seconds after which to try again."""
        super().__init__(message)
        self.delay = delay


_STATUS: Mapping[type[Exception], int] = {
    NotFound: 404,
    Unauthorized: 401,
    Forbidden: 403,
    Gone: 410,
    Late: 408,
    TooLarge: 413,
    NotSatisfiable: 416,
    TooMany: 429,
    UserError: 400,
    TemporaryError: 503,
}


def status_of(error: Exception) -> int:
    """The HTTP status for an error."""
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return _STATUS[kind]
    return 500


def headers_of(error: Exception) -> dict[str, str]:
    """The headers that belong to an error."""
    if isinstance(error, (TooMany, TemporaryError)):
        return {"Retry-After": str(max(1, math.ceil(error.delay)))}
    if isinstance(error, NotSatisfiable):
        return {"Content-Range": f"bytes */{error.size}"}
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return {}
