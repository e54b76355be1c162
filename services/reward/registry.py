"""The rewards that can be named in a job.

All of this happens in the processes that score (see `child`), so that no import of a plugin can harm the service.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from services.reward.api import CHECK, Reward, UserError
from services.reward.policy import MIXTURE, Part, Scorer, component_names, guarded
from shared import plugins
from shared.contracts.base import Name, Strict
from shared.contracts.jobs import FieldError

FAMILY = plugins.Family(
    word="reward",
    entry_points="openrl.rewards",
    builtin={
        "environment": "services.reward.builtin:environment_reward",
        "exact_match": "services.reward.builtin:exact_match",
        "length_penalty": "services.reward.builtin:length_penalty",
        "numeric": "services.reward.builtin:numeric",
        "regex": "services.reward.builtin:regex",
    },
)
OWN_ARGUMENTS = ("episode",)


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
    def load(cls, listed: Sequence[str]) -> Registry:
        """Import everything that is registered. Raise `UserError` for a plugin that is not `name=module:attribute`."""
        loaded = plugins.load(FAMILY, listed, accepted, taken=(MIXTURE,))
        return cls(loaded.usable, loaded.broken)

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
        mixture = plugins.checked_params(FAMILY, MIXTURE, MixtureParams, params, "reward.params")
        names = component_names([part.name for part in mixture.parts])
        parts = [
            self._part(part.name, part.params, f"reward.params.parts[{place}].params", component, part.weight)
            for place, (part, component) in enumerate(zip(mixture.parts, names, strict=True))
        ]
        return Scorer(parts, mixture=True)

    def errors(self, name: str, params: Any, path: str) -> list[FieldError]:
        """Everything that is wrong with a reward; `path` is where it stands in a job."""
        if name != MIXTURE:
            return self._part_errors(name, params, path)
        errors = plugins.param_errors(MixtureParams, params, f"{path}.params")
        parts = params.get("parts")
        for place, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict) and isinstance(part.get("name"), str):
                errors += self._part_errors(part["name"], part.get("params", {}), f"{path}.params.parts[{place}]")
        return errors

    def _part_errors(self, name: str, params: Any, path: str) -> list[FieldError]:
        reward = self._rewards.get(name)
        if reward is None:
            inside = f"it cannot be a part of {MIXTURE!r} again: write all parts in one list"
            unknown = str(plugins.unknown(FAMILY, name, self.names, self._broken))
            return [FieldError(path=f"{path}.name", message=inside if name == MIXTURE else unknown)]
        place = f"{path}.params"
        if errors := plugins.param_errors(plugins.params_of(reward, OWN_ARGUMENTS), params, place):
            return errors
        try:
            self._part(name, params, place)
        except UserError as error:
            return [FieldError(path=place, message=str(error))]
        return []

    def _part(
        self, name: str, params: Mapping[str, Any], path: str, component: str | None = None, weight: float = 1.0
    ) -> Part:
        if name == MIXTURE:
            raise UserError(f"a part of reward {MIXTURE!r} cannot be {MIXTURE!r} again: write all parts in one list")
        reward = self._rewards.get(name)
        if reward is None:
            raise plugins.unknown(FAMILY, name, self.names, self._broken)
        kind = plugins.params_of(reward, OWN_ARGUMENTS)
        checked = msgspec.structs.asdict(plugins.checked_params(FAMILY, name, kind, params, path))
        if check := getattr(reward, CHECK, None):
            guarded(name, check, **checked)
        return Part(name, component or name, weight, reward, checked)


def accepted(_: str, thing: object) -> Reward:
    """The function that `thing` is. Raise `UserError` if it cannot be called as a reward."""
    if not callable(thing):
        raise UserError(f"it is {thing!r:.100}: a reward must be a function")
    plugins.params_of(thing, OWN_ARGUMENTS)
    return thing
