"""Whether a job can run here: every error of its specification at once. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from services.coordinator.limits import check_sizes
from services.coordinator.policy import reward_names
from shared import validation
from shared.contracts.episodes import RewardSpec
from shared.contracts.jobs import AlgorithmSpec, FieldError, JobSpec
from shared.contracts.replicas import ReplicaRecord
from shared.errors import UserError
from shared.loss_params import LOSS_PARAMS, loss_params


def check(data: Any, replicas: Sequence[ReplicaRecord]) -> tuple[JobSpec | None, list[FieldError]]:
    """The job in `data`, or all that is wrong with it; `replicas` are the processes that live now."""
    spec, errors = validation.convert(data, JobSpec)
    if spec is None:
        return None, errors
    errors = [*_check_names(spec, replicas), *_check_rules(spec)]
    return (None, errors) if errors else (spec, [])


def _check_names(spec: JobSpec, replicas: Sequence[ReplicaRecord]) -> list[FieldError]:
    offers = {offer for replica in replicas for offer in replica.offers}
    errors = [
        *_known("environment.name", spec.environment.name, offers, "environment"),
        *_check_reward("reward", spec.reward, offers),
        *_check_model(spec.base_model, replicas),
    ]
    if spec.evaluation.reward is not None:
        errors += _check_reward("evaluation.reward", spec.evaluation.reward, offers)
    return errors


def _check_reward(path: str, reward: RewardSpec, offers: set[str]) -> list[FieldError]:
    errors = _known(f"{path}.name", reward.name, offers, "reward")
    for number, name in enumerate(reward_names(reward)[1:]):
        errors += _known(f"{path}.params.parts[{number}].name", name, offers, "reward")
    return errors


def _known(path: str, name: str, offers: set[str], kind: str) -> list[FieldError]:
    names = sorted(offer.partition(":")[2] for offer in offers if offer.startswith(f"{kind}:"))
    if name in names:
        return []
    if not names:
        return [FieldError(path=path, message=f"no {kind} service is running: see `openrl status`")]
    return [FieldError(path=path, message=f"unknown {kind} {name!r}; {_hint(name, names)}")]


def _check_model(name: str, replicas: Sequence[ReplicaRecord]) -> list[FieldError]:
    errors = []
    for service in ("sampler", "trainer"):
        served = sorted(
            {replica.base_model for replica in replicas if replica.service == service and replica.base_model}
        )
        if name not in served:
            what = f"; {_hint(name, served)}" if served else ""
            message = f"no {service} serves {name!r}{what}. Add it with `openrl model add` and `openrl up --model`"
            errors.append(FieldError(path="base_model", message=message))
    return (
        errors[:1]
        if len(errors) == 2 and errors[0].message.replace("sampler", "trainer") == errors[1].message
        else errors
    )


def _check_rules(spec: JobSpec) -> list[FieldError]:
    errors = [*check_sizes(spec), *_check_loss(spec.algorithm)]
    if spec.sampling.max_tokens == 0:
        errors.append(FieldError(path="sampling.max_tokens", message="0 leaves nothing to train on: give 1 or more"))
    if spec.sampling.temperature != 1:
        why = "log-probabilities are trained at temperature 1 and must be sampled at it: leave it out"
        errors.append(FieldError(path="sampling.temperature", message=f"{spec.sampling.temperature:g}: {why}"))
    if spec.sampling.seed is not None:
        errors.append(FieldError(path="sampling.seed", message="is set by the job's own seed: set `seed`"))
    return errors


def _check_loss(algorithm: AlgorithmSpec) -> list[FieldError]:
    known = LOSS_PARAMS[algorithm.loss]
    unknown = sorted(algorithm.loss_params.keys() - known)
    if unknown:
        message = f"unknown for {algorithm.loss}; known: {', '.join(known) or 'none'}"
        return [FieldError(path=f"algorithm.loss_params.{name}", message=message) for name in unknown]
    try:
        loss_params(algorithm.loss, algorithm.loss_params)
    except UserError as error:
        return [FieldError(path="algorithm.loss_params", message=str(error))]
    return []


def _hint(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}"
