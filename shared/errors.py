"""The errors of the mesh.

    MeshError
    ├── PermanentError      doing it again gives the same: the asker gets a failed result
    │   └── UserError       the request is wrong; the message names the value, the rule and the way out
    └── TemporaryError      worth trying again: the message is delivered once more after a delay
        └── StorageFull     no room for a message or a blob

`shared.worker` decides by these classes alone. Anything else that a handler raises is a defect and is treated as
permanent after the deliveries that its consumer allows.
"""

from __future__ import annotations

from shared.contracts.base import Failure


class MeshError(Exception):
    """Base of all errors below."""


class PermanentError(MeshError):
    """It will not work however often it is tried."""


class UserError(PermanentError):
    """Somebody can mend this by asking for something else. The text is shown to them as it stands."""


class TemporaryError(MeshError):
    """It may work later."""

    def __init__(self, message: str, *, delay: float = 1.0) -> None:
        """`delay` is how long to wait before the next try, in seconds."""
        super().__init__(message)
        self.delay = delay


class StorageFull(TemporaryError):
    """The disk, the bucket or the stream has no room left."""


def failure_of(error: BaseException) -> Failure:
    """Put an error into words for whoever asked. Only a `UserError` is shown as the user's."""
    if isinstance(error, UserError):
        return Failure(message=str(error), kind="user")
    text = str(error) if isinstance(error, MeshError) else f"{type(error).__name__}: {error}"
    return Failure(message=text or type(error).__name__, kind="server")
