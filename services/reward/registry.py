"""The rewards that can be named in a job, built in, registered by installed packages, or listed as plugins.

A plugin that cannot be loaded takes nobody down: it is not offered, and whoever names it is told why. All of this
happens in the processes that score (see `child`), so that no import of a plugin can harm the service.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import msgspec

from services.reward.api import CHECK, Reward, UserError
from services.reward.policy import MIXTURE, Part, Scorer, component_names, guarded
from shared.contracts.base import NAME_PATTERN, Name, Strict

S = TypeVar("S", bound=msgspec.Struct)

ENTRY_POINTS = "openrl.rewards"
BUILTIN = {
    "environment": "services.reward.builtin:environment_reward",
    "exact_match": "services.reward.builtin:exact_match",
    "length_penalty": "services.reward.builtin:length_penalty",
    "numeric": "services.reward.builtin:numeric",
    "regex": "services.reward.builtin:regex",
}


class PartSpec(Strict):
    """One part of a mixture."""

    name: Name
    weight: float = 1.0
    params: dict[str, Any] = {}


class MixtureParams(Strict):
    """Parameters of `weighted`: the sum of its parts, each times its weight."""

    parts: Annotated[list[PartSpec], msgspec.Meta(min_length=1)]


class Registry:
    """Rewards by name."""

    def __init__(self, rewards: Mapping[str, Reward], broken: Mapping[str, str] | None = None) -> None:
        """`broken` says for each name that cannot be used why."""
        self._rewards = dict(rewards)
        self._broken = dict(broken or {})

    @classmethod
    def load(cls, plugins: Sequence[str]) -> Registry:
        """Import everything that is registered. Raise `UserError` for a plugin that is not `name=module:attribute`."""
        rewards: dict[str, Reward] = {}
        broken: dict[str, str] = {}
        for name, target in sources(plugins):
            try:
                if name in rewards or name == MIXTURE:
                    raise UserError(f"the name {name!r} is taken: register {target} under another one")
                rewards[name] = imported(name, target)
            except Exception as error:  # other people's code, imported: whatever it raises, the others must load
                broken.setdefault(name, f"{target}: {type(error).__name__}: {error}")
        return cls(rewards, broken)

    @property
    def names(self) -> list[str]:
        """What can be used, sorted."""
        return sorted([*self._rewards, MIXTURE])

    @property
    def broken(self) -> dict[str, str]:
        """What cannot be used, with the reason."""
        return self._broken

    def scorer(self, name: str, params: Mapping[str, Any]) -> Scorer:
        """The reward by this name with its parameters. Raise `UserError` if there is none, or they are wrong."""
        if name != MIXTURE:
            return Scorer([self._part(name, params, "reward.params")], mixture=False)
        mixture = checked_params(MIXTURE, MixtureParams, params, "reward.params")
        names = component_names([part.name for part in mixture.parts])
        parts = [
            self._part(part.name, part.params, f"reward.params.parts[{place}].params", component, part.weight)
            for place, (part, component) in enumerate(zip(mixture.parts, names, strict=True))
        ]
        return Scorer(parts, mixture=True)

    def _part(
        self, name: str, params: Mapping[str, Any], path: str, component: str | None = None, weight: float = 1.0
    ) -> Part:
        reward = self._rewards.get(name)
        if reward is None:
            raise UserError(self._unknown(name))
        checked = msgspec.structs.asdict(checked_params(name, params_of(reward), params, path))
        if check := getattr(reward, CHECK, None):
            guarded(name, check, **checked)
        return Part(name, component or name, weight, reward, checked)

    def _unknown(self, name: str) -> str:
        if name == MIXTURE:
            return f"a part of reward {MIXTURE!r} cannot be {MIXTURE!r} again: write all parts in one list"
        if reason := self._broken.get(name):
            return f"reward {name!r} could not be loaded ({reason}): mend it and restart the reward service"
        close = difflib.get_close_matches(name, self.names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"reward {name!r} is unknown: {hint}There are {', '.join(self.names)}"


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


def imported(name: str, target: str) -> Reward:
    """The function at `module:attribute`. Raises whatever importing it does."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"{name!r} cannot be a name: it may hold lower-case letters, digits, '-' and '_'")
    reward = importlib.metadata.EntryPoint(name, target, ENTRY_POINTS).load()
    if not callable(reward):
        raise UserError(f"it is {reward!r:.100}: a reward must be a function")
    params_of(reward)
    return reward  # type: ignore[no-any-return]  # callable, as far as one can see


def params_of(reward: Callable[..., Any]) -> type[Strict]:
    """A struct of a reward's parameters behind the episode. Raise `UserError` if it cannot be called so."""
    parameters = list(inspect.signature(reward).parameters.values())
    if not parameters:
        raise UserError("a reward must take the episode, and its parameters behind it")
    hints = get_type_hints(reward if inspect.isroutine(reward) else type(reward).__call__, include_extras=True)
    fields: list[Any] = []
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise UserError(f"its parameter {parameter} has no name: write each one out")
        default = () if parameter.default is parameter.empty else (msgspec.field(default_factory=_giving(parameter)),)
        fields.append((parameter.name, hints.get(parameter.name, Any), *default))
    struct = msgspec.defstruct("Params", fields, bases=(Strict,), kw_only=True, frozen=True)
    return cast("type[Strict]", struct)


def _giving(parameter: inspect.Parameter) -> Callable[[], Any]:
    return lambda: parameter.default


def checked_params(name: str, kind: type[S], params: Mapping[str, Any], path: str) -> S:
    """Parameters as their type. Raise `UserError` that names the field; `path` is where the parameters stand."""
    known = ", ".join(kind.__struct_fields__) or "none"
    if unknown := sorted(set(params) - set(kind.__struct_fields__)):
        raise UserError(f"reward {name!r} has no parameter {', '.join(map(repr, unknown))}: it has {known}")
    try:
        return msgspec.convert(dict(params), kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`$.", f"`{path}.")
        raise UserError(f"reward {name!r}: {text} (its parameters: {known})") from None
