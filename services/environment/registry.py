"""The environments that can be named in a job."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec

from services.environment.api import Environment, EnvironmentParams, NoParams, Split, Task
from shared import plugins
from shared.contracts.episodes import EnvironmentSpec
from shared.contracts.jobs import FieldError
from shared.errors import UserError

log = logging.getLogger(__name__)

FAMILY = plugins.Family(
    word="environment",
    entry_points="openrl.environments",
    builtin={
        "arithmetic": "services.environment.builtin.arithmetic:Arithmetic",
        "guess_number": "services.environment.builtin.guess_number:GuessNumber",
        "reasoning_gym": "services.environment.builtin.reasoning_gym:ReasoningGym",
    },
)
OWN_ARGUMENTS = ("split", "index", "seed")
"""Of an environment that is a function."""


class Registry:
    """Environments by name."""

    def __init__(self, kinds: Mapping[str, type[Environment[Any]]], broken: Mapping[str, str] | None = None) -> None:
        """`broken` says for each name that cannot be used why."""
        self._kinds = dict(kinds)
        self._broken = dict(broken or {})

    @classmethod
    def load(cls, listed: Sequence[str]) -> Registry:
        """Import everything that is registered. Raise `UserError` for a plugin that is not `name=module:attribute`."""
        loaded = plugins.load(FAMILY, listed, kind_of)
        for name, reason in loaded.broken.items():
            log.error("environment %s cannot be used: %s", name, reason)
        return cls(loaded.usable, loaded.broken)

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
            raise plugins.unknown(FAMILY, spec.name, self.names, self._broken)
        params_type = getattr(kind, "Params", NoParams)
        return kind(plugins.checked_params(FAMILY, spec.name, params_type, spec.params, "environment.params"))

    def errors(self, name: str, params: Mapping[str, Any], path: str) -> list[FieldError]:
        """What can be told to be wrong without making the environment; `path` is where it stands in a job."""
        kind = self._kinds.get(name)
        if kind is None:
            reason = plugins.unknown(FAMILY, name, self.names, self._broken)
            return [FieldError(path=f"{path}.name", message=str(reason))]
        return plugins.param_errors(getattr(kind, "Params", NoParams), params, f"{path}.params")


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
    params_type = cast("type[EnvironmentParams]", plugins.params_of(function, OWN_ARGUMENTS, EnvironmentParams))

    class FunctionEnvironment(Environment[Any]):
        Params = params_type

        def task(self, split: Split, index: int, seed: int) -> Task:
            task = function(split, index, seed, **msgspec.structs.asdict(self.params))
            if not isinstance(task, Task):
                raise UserError(f"environment {name!r} returned {task!r:.200}: it must return a Task")
            return task

    return FunctionEnvironment
