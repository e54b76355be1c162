"""Check plain data against a struct type and report everything that is wrong with it, each with its field path.

`msgspec.convert` stops at the first error. Somebody who writes a job file wants all of them at once.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from shared.contracts import arrays
from shared.contracts.jobs import FieldError

T = TypeVar("T", bound=msgspec.Struct)
_NOTHING = object()


def convert(data: Any, kind: type[T], path: str = "", word: str = "field") -> tuple[T | None, list[FieldError]]:
    """The struct in `data`, or every error. Exactly one of the two is empty.

    `path` is where the data stands, and `word` what a field of it is called.
    """
    _, errors = _check(data, kind, Place(path, word))
    if errors:
        return None, errors
    try:
        return msgspec.convert(data, kind, dec_hook=arrays.decode), []
    except msgspec.ValidationError as error:  # a rule that only holds for the whole
        return None, [FieldError(path=path, message=str(error))]


def readable(data: Any, kind: type[msgspec.Struct]) -> tuple[dict[str, Any], list[FieldError]]:
    """The part of `data` that is right, field by field, and every error in the rest."""
    found, errors = _check(data, kind, Place("", "field"))
    return found if isinstance(found, dict) else {}, errors


@dataclass(frozen=True)
class Place:
    """Where something stands in the data."""

    path: str
    word: str
    """What people call a field there."""

    def field(self, name: str) -> Place:
        """The place of a field."""
        return Place(f"{self.path}.{name}" if self.path else name, self.word)

    def item(self, number: int) -> Place:
        """The place of an item of a list."""
        return Place(f"{self.path}[{number}]", self.word)


def _check(data: Any, kind: Any, place: Place) -> tuple[Any, list[FieldError]]:
    """What is right of `data` (`_NOTHING` if nothing is), and all errors."""
    struct = _struct_in(kind)
    if struct is not None and isinstance(data, dict):
        return _check_struct(data, struct, place)
    if (item := _item_struct(kind)) is not None and isinstance(data, list):
        errors = [error for number, part in enumerate(data) for error in _check(part, item, place.item(number))[1]]
        if errors:
            return _NOTHING, errors
    try:
        msgspec.convert(data, kind, dec_hook=arrays.decode)
    except msgspec.ValidationError as error:
        return _NOTHING, [_located(error, place.path, data, kind)]
    errors = list(unwritable(data, place))
    return (_NOTHING if errors else data), errors


def _check_struct(
    data: dict[Any, Any], struct: type[msgspec.Struct], place: Place
) -> tuple[dict[str, Any], list[FieldError]]:
    hints = get_type_hints(struct, include_extras=True)
    known = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    strict = struct.__struct_config__.forbid_unknown_fields
    errors = [unknown(key, known, place) for key in data if key not in known] if strict else []
    right = {}
    for name, field in known.items():
        if name in data:
            found, wrong = _check(data[name], hints[field.name], place.field(name))
            errors += wrong
            if found is not _NOTHING:
                right[name] = found
        elif field.required:
            errors.append(FieldError(path=place.field(name).path, message="is required"))
    return right, errors


def unwritable(data: Any, place: Place) -> Iterator[FieldError]:
    """An error for every number in plain data that a message cannot carry: JSON has no NaN, MessagePack 64 bits."""
    if isinstance(data, float) and not math.isfinite(data):
        yield FieldError(path=place.path, message=f"{data} is no finite number")
    elif isinstance(data, int) and not -(2**63) <= data < 2**64:
        yield FieldError(path=place.path, message=f"{str(data)[:40]} does not fit into 64 bits")
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from unwritable(value, place.field(str(key)))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from unwritable(value, place.item(number))


def unknown(key: Any, known: Iterable[str], place: Place) -> FieldError:
    """The error at a field that there is not."""
    close = difflib.get_close_matches(str(key), list(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known {place.word}s: {', '.join(known) or 'none'}"
    return FieldError(path=place.field(str(key)).path, message=f"unknown {place.word}; {hint}")


def _located(error: msgspec.ValidationError, path: str, data: Any, kind: Any) -> FieldError:
    """Move the place that msgspec writes at the end of its message into the path, and name value and choices."""
    message, _, place = str(error).partition(" - at `$")
    if get_origin(kind) is Literal:
        message = f"{data!r} is none of {', '.join(map(str, get_args(kind)))}"
    elif "got" not in message and not place:
        message += f", got {str(data)[:80]!r}" if isinstance(data, str) else f", got {str(data)[:80]}"
    return FieldError(path=path + place.rstrip("`"), message=message)


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The one struct type in `X`, `X | None` or `Annotated[X, …]`."""
    if get_origin(kind) is Annotated:
        return _struct_in(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        found = [struct for part in get_args(kind) if (struct := _struct_in(part))]
        return found[0] if len(found) == 1 else None
    plain = isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag is None
    return kind if plain else None


def _item_struct(kind: Any) -> type[msgspec.Struct] | None:
    """The struct type of the items of `list[X]` or `Annotated[list[X], …]`."""
    if get_origin(kind) is Annotated:
        return _item_struct(get_args(kind)[0])
    return _struct_in(get_args(kind)[0]) if get_origin(kind) is list else None
