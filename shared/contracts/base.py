"""The base of every message, the names that appear in them, and the failure that answers a request gone wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, dataclass_transform

import msgspec

if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
    class _Meta(msgspec.StructMeta):
        """Tells type checkers that subclasses inherit `frozen` and `kw_only`, as they do at run time."""
else:
    _Meta = msgspec.StructMeta


class Contract(msgspec.Struct, metaclass=_Meta, frozen=True, kw_only=True):
    """A message or a part of one. Unknown fields are ignored, so that an older reader survives a newer writer."""


class Strict(msgspec.Struct, metaclass=_Meta, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What people write by hand. An unknown field is an error, since it is most likely a misspelt one."""


NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
"""Names become subject tokens, file names and metric labels, so they hold nothing that is special in any of these."""

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN, description="lower-case letters, digits, '-' and '_'")]

ErrorKind = Literal["user", "server"]
"""Who can mend it: `user` errors name a value and the way out, `server` errors are ours."""


class Failure(Contract):
    """Why a request has no answer."""

    message: str
    kind: ErrorKind = "server"
