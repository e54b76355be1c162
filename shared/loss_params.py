"""Which parameters each loss takes, their defaults and their bounds.

Plain data, so that a job is checked where it is submitted, far from any tensor. The formulas are in
`shared.models.losses`, both together in docs/losses.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from shared.contracts.training import LossName
from shared.errors import UserError

LOSS_PARAMS: Mapping[LossName, Mapping[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low": 0.8, "clip_high": 1.2},
    "cispo": {"clip_low": 0.0, "clip_high": 4.0},
    "dro": {"beta": 0.05},
    "gspo": {"clip_low": 0.8, "clip_high": 1.2},
    "stable_reinforce": {"clip_high": 2.0, "kl_coeff": 0.1},
}
"""Of each loss, its parameters with what they are where nothing is given."""

PENALTIES = frozenset({"beta", "kl_coeff"})
"""Parameters that weigh a penalty against the advantages: whoever scales the advantages scales these too."""

# Tinker's clients send these.
LONGER_NAMES = {"clip_low_threshold": "clip_low", "clip_high_threshold": "clip_high"}


def loss_params(loss: str, given: Mapping[str, float]) -> dict[str, float]:
    """Return all parameters of a loss, the given ones in the place of its defaults.

    Raise `UserError` for an unknown loss, and for a parameter that is unknown, repeated, not finite or out of bounds.
    """
    defaults = next((params for name, params in LOSS_PARAMS.items() if name == loss), None)
    if defaults is None:
        raise UserError(f"loss {loss!r} is unknown: choose one of {', '.join(LOSS_PARAMS)}")
    params = {**defaults, **_by_short_name(loss, given)}
    _check_bounds(loss, params)
    return params


def _by_short_name(loss: str, given: Mapping[str, float]) -> dict[str, float]:
    known = LOSS_PARAMS[loss]  # type: ignore[index]  # it was found
    params: dict[str, float] = {}
    for long_name, value in given.items():
        name = LONGER_NAMES.get(long_name, long_name)
        if not known:
            raise UserError(f"loss {loss} has no parameters, but {', '.join(sorted(given))} was given")
        if name not in known:
            raise UserError(f"{loss} has no parameter {long_name!r}: it takes {' and '.join(known)}")
        if not math.isfinite(value):
            raise UserError(f"{loss}: {long_name} is {value}, it must be a finite number")
        if name in params:
            raise UserError(f"{loss}: {name} is given twice, under two names")
        params[name] = value
    return params


def _check_bounds(loss: str, params: Mapping[str, float]) -> None:
    low, high = params.get("clip_low", 0.0), params.get("clip_high", math.inf)
    if not 0 <= low <= high:
        raise UserError(f"{loss}: clip_low {low:g} must be from 0 to clip_high {high:g}")
    for name in PENALTIES & params.keys():
        if params[name] < 0:
            raise UserError(f"{loss}: {name} is {params[name]:g}, it must be 0 or more")
    if loss == "stable_reinforce" and high < 1:
        raise UserError(f"{loss}: clip_high is {high:g}, it must be 1 or more: tokens on policy have the ratio 1")
