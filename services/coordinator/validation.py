"""Whether a job can run here: every error of its specification at once. Pure.

What has the wrong type is left out, and the rest is checked all the same, so that nobody mends one half of a job only
to be told of the other. What only an environment or a reward can tell becomes a question to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from services.coordinator.limits import check_sizes
from services.coordinator.policy import reward_names
from shared import validation
from shared.contracts.checks import CheckEnvironment, CheckReward
from shared.contracts.episodes import RewardSpec
from shared.contracts.jobs import AlgorithmSpec, FieldError, JobSpec
from shared.contracts.replicas import CONTEXT, SCALED, ReplicaRecord
from shared.contracts.sampling import SamplingParams
from shared.errors import UserError
from shared.loss_params import LOSS_PARAMS, loss_params

_PLACEHOLDERS: dict[str, Any] = {
    "name": "unread",
    "base_model": "unread",
    "environment": {"name": "unread"},
    "reward": {"name": "unread"},
}
"""For what must be there and cannot be read. Nothing is said about these: there is an error at each already."""

Question = CheckEnvironment | CheckReward


@dataclass(frozen=True)
class Draft:
    """A job as far as it can be read."""

    spec: JobSpec | None
    """With defaults in place of what is wrong. None: it is no object at all."""
    errors: list[FieldError]
    """What could not be read."""

    def without_errors(self, *paths: str) -> bool:
        """Whether everything at and below these paths could be read."""
        return not any(_touches(error.path, path) for error in self.errors for path in paths)


def read(data: Any) -> Draft:
    """The job in `data`, and everything that is wrong with its form."""
    if not isinstance(data, dict):
        return Draft(None, validation.convert(data, JobSpec)[1])
    found, errors = validation.readable(data, JobSpec)
    if not errors:
        return Draft(msgspec.convert(found, JobSpec), [])
    whole: dict[str, Any] = {**_PLACEHOLDERS, **found}
    for name in ("environment", "reward"):
        whole[name] = {**_PLACEHOLDERS[name], **whole[name]}
    evaluation = dict(whole.get("evaluation", {}))
    if "name" not in (evaluation.get("reward") or ()):
        evaluation["reward"] = None
    whole["evaluation"] = evaluation
    return Draft(msgspec.convert(whole, JobSpec), errors)


def check(draft: Draft, replicas: Sequence[ReplicaRecord]) -> list[FieldError]:
    """All that is wrong with a job, as far as it can be told here; `replicas` are the processes that live now."""
    if draft.spec is None:
        return draft.errors
    found = [*_check_names(draft.spec, replicas), *_check_rules(draft.spec), *_check_context(draft.spec, replicas)]
    return [*draft.errors, *(error for error in found if draft.without_errors(error.path))]


def questions(draft: Draft, errors: Sequence[FieldError], ask: Callable[[], str]) -> list[Question]:
    """What environment and rewards are to be asked, of those that are named rightly. `ask` makes request ids."""
    spec, wrong = draft.spec, {error.path for error in errors}
    if spec is None:
        return []
    found: list[Question] = []
    if draft.without_errors("environment.name", "environment.params") and "environment.name" not in wrong:
        tasks = spec.evaluation.tasks if draft.without_errors("evaluation.tasks") else 0
        environment = spec.environment
        found.append(
            CheckEnvironment(
                request_id=ask(), name=environment.name, params=environment.params, seed=spec.seed, held_out=tasks
            )
        )
    rewards = {"reward": spec.reward, "evaluation.reward": spec.evaluation.reward}
    for path, reward in rewards.items():
        known = draft.without_errors(f"{path}.name", f"{path}.params") and f"{path}.name" not in wrong
        if reward is not None and known:
            found.append(CheckReward(request_id=ask(), name=reward.name, params=reward.params, path=path))
    return found


def merged(errors: Iterable[FieldError]) -> list[FieldError]:
    """One error for each path, the first; those of one place that several have looked at say the same."""
    found: dict[str, FieldError] = {}
    for error in errors:
        found.setdefault(error.path, error)
    return list(found.values())


def _touches(one: str, other: str) -> bool:
    """Whether one of two paths leads to the other."""
    short, long = sorted((one, other), key=len)
    return not short or long == short or (long.startswith(short) and long[len(short)] in ".[")


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
        now = {replica.base_model for replica in replicas if replica.service == service and replica.base_model}
        served = sorted(now | _when_asked(service, replicas))
        if name not in served:
            what = f"; {_hint(name, served)}" if served else ""
            message = f"no {service} serves {name!r}{what}. Add it with `openrl model add` and `openrl up --model`"
            errors.append(FieldError(path="base_model", message=message))
    return (
        errors[:1]
        if len(errors) == 2 and errors[0].message.replace("sampler", "trainer") == errors[1].message
        else errors
    )


def _when_asked(service: str, replicas: Sequence[ReplicaRecord]) -> set[str]:
    """Models for which an autoscaler starts replicas when there is work for them."""
    begin = f"{SCALED}{service}:"
    return {offer.removeprefix(begin) for replica in replicas for offer in replica.offers if offer.startswith(begin)}


def _check_rules(spec: JobSpec) -> list[FieldError]:
    errors = [*check_sizes(spec), *_check_loss(spec.algorithm), *_check_stop(spec.sampling)]
    if spec.sampling.max_tokens == 0:
        errors.append(FieldError(path="sampling.max_tokens", message="0 leaves nothing to train on: give 1 or more"))
    if spec.sampling.temperature != 1:
        why = "log-probabilities are trained at temperature 1 and must be sampled at it: leave it out"
        errors.append(FieldError(path="sampling.temperature", message=f"{spec.sampling.temperature:g}: {why}"))
    if spec.sampling.seed is not None:
        errors.append(FieldError(path="sampling.seed", message="is set by the job's own seed: set `seed`"))
    if not (spec.lora.train_attn or spec.lora.train_mlp or spec.lora.train_unembed):
        why = "train_attn, train_mlp and train_unembed are all false, which leaves nothing to train: set one to true"
        errors.append(FieldError(path="lora", message=why))
    return errors


def _check_stop(sampling: SamplingParams) -> list[FieldError]:
    errors = []
    for number, stop in enumerate(sampling.stop or ()):
        path = f"sampling.stop[{number}]"
        if stop == "":
            errors.append(FieldError(path=path, message="'' stands everywhere: give at least one character"))
        elif isinstance(stop, int) and stop < 0:
            errors.append(FieldError(path=path, message=f"{stop} is no token id: they are 0 and more"))
    return errors


def _check_context(spec: JobSpec, replicas: Sequence[ReplicaRecord]) -> list[FieldError]:
    """Replies that could not fit behind any prompt, where the samplers say how much fits."""
    offers = [offer for replica in replicas if replica.base_model == spec.base_model for offer in replica.offers]
    contexts = [int(offer.removeprefix(CONTEXT)) for offer in offers if offer.startswith(CONTEXT)]
    if not contexts:
        return []
    wanted = {"sampling.max_tokens": spec.sampling.max_tokens, "evaluation.max_tokens": spec.evaluation.max_tokens}
    rule = f"leaves no room for a prompt in the context of {min(contexts)} tokens of {spec.base_model!r}: give less"
    return [
        FieldError(path=path, message=f"{tokens} {rule}")
        for path, tokens in wanted.items()
        if tokens is not None and tokens >= min(contexts)
    ]


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
