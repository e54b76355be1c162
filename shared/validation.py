"""Check plain data against a struct type and report everything that is wrong with it, each with its field path.

`msgspec.convert` stops at the first error. Somebody who writes a job file wants all of them at once.
"""

from __future__ import annotations

import difflib
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from shared.contracts import arrays
from shared.contracts.jobs import FieldError

T = TypeVar("T", bound=msgspec.Struct)


def convert(data: Any, kind: type[T]) -> tuple[T | None, list[FieldError]]:
    """The struct in `data`, or every error. Exactly one of the two is empty."""
    errors = _check(data, kind, "")
    if errors:
        return None, errors
    try:
        return msgspec.convert(data, kind, dec_hook=arrays.decode), []
    except msgspec.ValidationError as error:  # a rule that only holds for the whole
        return None, [FieldError(path="", message=str(error))]


def _check(data: Any, kind: Any, path: str) -> list[FieldError]:
    struct = _struct_in(kind)
    if struct is not None and isinstance(data, dict):
        return _check_struct(data, struct, path)
    if struct is not None and data is None and _optional(kind):
        return []
    try:
        msgspec.convert(data, kind, dec_hook=arrays.decode)
    except msgspec.ValidationError as error:
        return [_located(error, path, data, kind)]
    return []


def _check_struct(data: dict[Any, Any], struct: type[msgspec.Struct], path: str) -> list[FieldError]:
    hints = get_type_hints(struct, include_extras=True)
    known = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    errors = [_unknown(key, known, path) for key in data if key not in known]
    for name, field in known.items():
        if name in data:
            errors += _check(data[name], hints[field.name], _join(path, name))
        elif field.required:
            errors.append(FieldError(path=_join(path, name), message="is required"))
    return errors


def _unknown(key: Any, known: dict[str, Any], path: str) -> FieldError:
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"
    return FieldError(path=_join(path, str(key)), message=f"unknown field; {hint}")


def _located(error: msgspec.ValidationError, path: str, data: Any, kind: Any) -> FieldError:
    """Move the place that msgspec writes at the end of its message into the path, and name value and choices."""
    message, _, place = str(error).partition(" - at `$")
    if get_origin(kind) is Literal:
        message = f"{data!r} is none of {', '.join(map(str, get_args(kind)))}"
    elif "got" not in message and not place:
        message += f", got {str(data)[:80]!r}" if isinstance(data, str) else f", got {str(data)[:80]}"
    return FieldError(path=path + place.rstrip("`"), message=message)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The one struct type in `X`, `X | None` or `Annotated[X, …]`."""
    if get_origin(kind) is Annotated:
        return _struct_in(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        found = [struct for part in get_args(kind) if (struct := _struct_in(part))]
        return found[0] if len(found) == 1 else None
    return kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None


def _optional(kind: Any) -> bool:
    return type(None) in get_args(kind)
