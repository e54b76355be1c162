"""The environments that can be named in a job: built in, registered by installed packages, or listed as plugins.

A plugin that cannot be loaded takes nobody down: it is not offered, and whoever names it is told why.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast, get_type_hints

import msgspec

from services.environment.api import Environment, EnvironmentParams, NoParams, Split, Task
from shared.contracts.base import NAME_PATTERN
from shared.contracts.episodes import EnvironmentSpec
from shared.errors import UserError

log = logging.getLogger(__name__)

ENTRY_POINTS = "openrl.environments"
BUILTIN = {
    "arithmetic": "services.environment.builtin.arithmetic:Arithmetic",
    "guess_number": "services.environment.builtin.guess_number:GuessNumber",
    "reasoning_gym": "services.environment.builtin.reasoning_gym:ReasoningGym",
}
OWN_ARGUMENTS = 3
"""Of an environment that is a function: split, index, seed."""


class Registry:
    """Environments by name."""

    def __init__(self, kinds: Mapping[str, type[Environment[Any]]], broken: Mapping[str, str] | None = None) -> None:
        """`broken` says for each name that cannot be used why."""
        self._kinds = dict(kinds)
        self._broken = dict(broken or {})

    @classmethod
    def load(cls, plugins: Sequence[str]) -> Registry:
        """Import everything that is registered. Raise `UserError` for a plugin that is not `name=module:attribute`."""
        kinds: dict[str, type[Environment[Any]]] = {}
        broken: dict[str, str] = {}
        for name, target in sources(plugins):
            try:
                if name in kinds:
                    raise UserError(f"the name {name!r} is taken: register {target} under another one")
                kinds[name] = kind_of(name, imported(name, target))
            except Exception as error:  # other people's code, imported: whatever it raises, the others must load
                log.error("environment %s (%s) cannot be used", name, target, exc_info=error)
                broken.setdefault(name, f"{target}: {type(error).__name__}: {error}")
        return cls(kinds, broken)

    @property
    def names(self) -> list[str]:
        """What can be used, sorted."""
        return sorted(self._kinds)

    @property
    def broken(self) -> Mapping[str, str]:
        """What cannot be used, with the reason."""
        return self._broken

    def make(self, spec: EnvironmentSpec) -> Environment[Any]:
        """The environment that `spec` describes. Raise `UserError` if there is none, or its parameters are wrong."""
        kind = self._kinds.get(spec.name)
        if kind is None:
            raise UserError(self._unknown(spec.name))
        return kind(checked_params(spec.name, getattr(kind, "Params", NoParams), spec.params))

    def _unknown(self, name: str) -> str:
        if reason := self._broken.get(name):
            return f"environment {name!r} could not be loaded ({reason}): mend it and restart the environment service"
        close = difflib.get_close_matches(name, self.names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"environment {name!r} is unknown: {hint}There are {', '.join(self.names)}"


def sources(plugins: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Name and `module:attribute` of everything registered, plugins last. A name may come with several targets."""
    installed = {(point.name, point.value) for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    yield from BUILTIN.items()
    yield from sorted(installed - set(BUILTIN.items()))
    for plugin in plugins:
        found = re.fullmatch(r"([^=\s]+)=([\w.]+:[\w.]+)", plugin)
        if not found:
            raise UserError(f"plugin {plugin!r} is not understood: write it as name=module:attribute")
        yield found[1], found[2]


def imported(name: str, target: str) -> object:
    """The object at `module:attribute`. Raises whatever importing it does."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"{name!r} cannot be a name: it may hold lower-case letters, digits, '-' and '_'")
    return importlib.metadata.EntryPoint(name, target, ENTRY_POINTS).load()


def kind_of(name: str, thing: object) -> type[Environment[Any]]:
    """The environment class that `thing` is, or that stands for it if it is a function."""
    if isinstance(thing, type):
        if not issubclass(thing, Environment):
            raise UserError(f"{thing.__qualname__} is no environment: derive it from services.environment.api")
        if inspect.isabstract(thing):
            raise UserError(f"{thing.__qualname__} lacks {', '.join(sorted(thing.__abstractmethods__))}()")
        return thing
    if callable(thing):
        return from_function(name, thing)
    raise UserError(f"environment {name!r} is {thing!r:.100}: it must be an Environment class or a function")


def from_function(name: str, function: Callable[..., Any]) -> type[Environment[Any]]:
    """A single-turn environment whose tasks are `function(split, index, seed, **params)`."""
    params_type = params_of(function)

    class FunctionEnvironment(Environment[Any]):
        Params = params_type

        def task(self, split: Split, index: int, seed: int) -> Task:
            task = function(split, index, seed, **msgspec.structs.asdict(self.params))
            if not isinstance(task, Task):
                raise UserError(f"environment {name!r} returned {task!r:.200}: it must return a Task")
            return task

    return FunctionEnvironment


def params_of(function: Callable[..., Any]) -> type[EnvironmentParams]:
    """A struct of a function's parameters behind the first three. Raise `UserError` if it cannot be called so."""
    parameters = list(inspect.signature(function).parameters.values())
    hints = get_type_hints(function, include_extras=True)
    fields: list[Any] = []
    for parameter in parameters[OWN_ARGUMENTS:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise UserError(f"parameter {parameter} of {function.__qualname__} has no name: write each one out")
        default = () if parameter.default is parameter.empty else (msgspec.field(default_factory=_giving(parameter)),)
        fields.append((parameter.name, hints.get(parameter.name, Any), *default))
    if len(parameters) < OWN_ARGUMENTS:
        raise UserError(f"{function.__qualname__} must take (split, index, seed), and its parameters behind them")
    struct = msgspec.defstruct("Params", fields, bases=(EnvironmentParams,), kw_only=True, frozen=True)
    return cast("type[EnvironmentParams]", struct)


def _giving(parameter: inspect.Parameter) -> Callable[[], Any]:
    return lambda: parameter.default


def checked_params(name: str, kind: type[EnvironmentParams], params: Mapping[str, Any]) -> EnvironmentParams:
    """Parameters as their type. Raise `UserError` that names the field."""
    known = ", ".join(kind.__struct_fields__) or "none"
    if unknown := sorted(set(params) - set(kind.__struct_fields__)):
        raise UserError(f"environment {name!r} has no parameter {', '.join(map(repr, unknown))}: it has {known}")
    try:
        return msgspec.convert(dict(params), kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`$.", "`environment.params.")
        raise UserError(f"environment {name!r}: {text} (its parameters: {known})") from None
