"""Other people's code by name: built in, registered by installed packages, or listed in a configuration.

Environments and rewards are both found so. A plugin that cannot be loaded takes nobody down: it is not offered, and
whoever names it is told why. The parameters of a plugin that is a function are read off its signature.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast, get_type_hints

import msgspec

from shared import validation
from shared.contracts.base import NAME_PATTERN, Strict
from shared.contracts.jobs import FieldError
from shared.errors import UserError

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True)
class Family:
    """One family of plugins."""

    word: str
    """What one is called in messages, and the service that loads it: `environment`, `reward`."""
    entry_points: str
    """The group that packages register theirs in."""
    builtin: Mapping[str, str]
    """Name and `module:attribute` of those that come with the project."""


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The plugins of a family: those that can be used, and why the others cannot."""

    usable: dict[str, T]
    broken: dict[str, str]


def load(
    family: Family, plugins: Sequence[str], accept: Callable[[str, object], T], taken: Sequence[str] = ()
) -> Loaded[T]:
    """Import everything that is registered; `accept` makes something usable of a name and what was imported for it.

    Names in `taken` cannot be used. Raise `UserError` for a plugin that is not written as `name=module:attribute`.
    """
    loaded = Loaded[T]({}, {})
    for name, target in _sources(family, plugins):
        try:
            if name in loaded.usable or name in taken:
                raise UserError(f"the name {name!r} is taken: register {target} under another one")
            loaded.usable[name] = accept(name, _imported(family, name, target))
        except Exception as error:  # other people's code, imported: whatever it raises, the others must load
            loaded.broken.setdefault(name, f"{target}: {type(error).__name__}: {error}")
    return loaded


def unknown(family: Family, name: str, names: Sequence[str], broken: Mapping[str, str]) -> UserError:
    """What to tell somebody who names a plugin that is not there."""
    if reason := broken.get(name):
        return UserError(
            f"{family.word} {name!r} could not be loaded ({reason}): mend it and restart the {family.word} service"
        )
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"{family.word} {name!r} is unknown: {hint}There are {', '.join(names)}")


def params_of(function: Callable[..., Any], own: Sequence[str], base: type[Strict] = Strict) -> type[Strict]:
    """A struct of a function's parameters behind its `own` ones. Raise `UserError` if it cannot be called so."""
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) < len(own):
        raise UserError(f"it must take ({', '.join(own)}), and its parameters behind that")
    hints = get_type_hints(function if inspect.isroutine(function) else type(function).__call__, include_extras=True)
    fields: list[Any] = []
    for parameter in parameters[len(own) :]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise UserError(f"its parameter {parameter} has no name: write each one out")
        default = () if parameter.default is parameter.empty else (msgspec.field(default_factory=_giving(parameter)),)
        fields.append((parameter.name, hints.get(parameter.name, Any), *default))
    return cast("type[Strict]", msgspec.defstruct("Params", fields, bases=(base,), kw_only=True, frozen=True))


def checked_params(family: Family, name: str, kind: type[S], params: Mapping[str, Any], path: str) -> S:
    """Parameters as their type. Raise `UserError` that names the field; `path` is where they stand in a job."""
    known = ", ".join(kind.__struct_fields__) or "none"
    if strange := sorted(set(params) - set(kind.__struct_fields__)):
        raise UserError(f"{family.word} {name!r} has no parameter {', '.join(map(repr, strange))}: it has {known}")
    try:
        return msgspec.convert(dict(params), kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`$.", f"`{path}.")
        raise UserError(f"{family.word} {name!r}: {text} (its parameters: {known})") from None


def param_errors(kind: type[msgspec.Struct], params: Any, path: str) -> list[FieldError]:
    """Everything that is wrong with parameters, each with its path; `path` is where they stand in a job."""
    known = kind.__struct_fields__
    _, errors = validation.convert(params, kind, path, "parameter")
    if not isinstance(params, dict) or kind.__struct_config__.forbid_unknown_fields:
        return errors
    return errors + [
        validation.unknown(name, known, validation.Place(path, "parameter")) for name in params if name not in known
    ]


def _sources(family: Family, plugins: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Name and `module:attribute` of everything registered, plugins last. A name may come with several targets."""
    installed = {(point.name, point.value) for point in importlib.metadata.entry_points(group=family.entry_points)}
    yield from family.builtin.items()
    yield from sorted(installed - set(family.builtin.items()))
    for plugin in plugins:
        found = re.fullmatch(r"([^=\s]+)=([\w.]+:[\w.]+)", plugin)
        if not found:
            raise UserError(f"plugin {plugin!r} is not understood: write it as name=module:attribute")
        yield found[1], found[2]


def _imported(family: Family, name: str, target: str) -> object:
    """The object at `module:attribute`. Raises whatever importing it does."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"{name!r} cannot be a name: it may hold lower-case letters, digits, '-' and '_'")
    return importlib.metadata.EntryPoint(name, target, family.entry_points).load()


def _giving(parameter: inspect.Parameter) -> Callable[[], Any]:
    return lambda: parameter.default
