"""A job specification with errors is answered with all of them, each with its path."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from services.coordinator.validation import check, merged, questions, read
from shared.contracts.checks import CheckEnvironment, CheckReward
from shared.contracts.jobs import FieldError, PolicyLoss
from shared.contracts.replicas import ReplicaRecord
from shared.contracts.training import LossName
from shared.loss_params import LOSS_PARAMS


def replica(service: str, **fields: Any) -> ReplicaRecord:
    return ReplicaRecord(replica=service, service=service, pid=1, host="h", metrics_port=1, ready=True, **fields)


LIVING = [
    replica("environment", offers=["environment:arithmetic", "environment:reasoning_gym"]),
    replica("reward", offers=["reward:exact_match", "reward:weighted", "reward:regex"]),
    replica("sampler", base_model="tiny", offers=["context:2048"]),
    replica("trainer", base_model="tiny"),
]


def job(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "first",
        "base_model": "tiny",
        "environment": {"name": "arithmetic"},
        "reward": {"name": "exact_match"},
    }
    return {**base, **changes}


def errors_of(data: Any) -> dict[str, str]:
    return {error.path: error.message for error in check(read(data), LIVING)}


def test_a_minimal_job_is_complete() -> None:
    assert errors_of(job()) == {}


@pytest.mark.parametrize("loss", get_args(PolicyLoss))
def test_every_policy_loss_can_be_asked_for_with_its_parameters(loss: PolicyLoss) -> None:
    assert errors_of(job(algorithm={"loss": loss, "loss_params": dict(LOSS_PARAMS[loss])})) == {}


def test_every_loss_but_the_supervised_one_is_for_jobs() -> None:
    assert {*get_args(PolicyLoss), "cross_entropy"} == set(get_args(LossName))


def test_every_error_is_reported_in_one_answer() -> None:
    found = errors_of(
        {
            "name": "No Spaces",
            "base_model": 3,
            "algoritm": {},
            "algorithm": {"steps": 0, "group_sise": 3, "loss": "dpo"},
            "environment": {"name": "arithmetic", "params": []},
            "sampling": {"stop": [1.5]},
        }
    )
    assert set(found) == {
        "name", "base_model", "algoritm", "algorithm.steps", "algorithm.group_sise", "algorithm.loss",
        "environment.params", "sampling.stop[0]", "reward",
    }  # fmt: skip
    assert found["algoritm"] == "unknown field; did you mean 'algorithm'?"
    assert found["algorithm.loss"] == ("'dpo' is none of importance_sampling, ppo, cispo, dro, gspo, stable_reinforce")
    assert found["algorithm.steps"] == "Expected `int` >= 1, got 0"
    assert found["reward"] == "is required"


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"environment": {"name": "arithmetics"}}, "environment.name", "did you mean 'arithmetic'?"),
        ({"reward": {"name": "vibes"}}, "reward.name", "known here: exact_match, regex, weighted"),
        ({"base_model": "gpt"}, "base_model", "`openrl model add`"),
        (
            {"reward": {"name": "weighted", "params": {"parts": [{"name": "exact_match"}, {"name": "regexp"}]}}},
            "reward.params.parts[1].name",
            "did you mean 'regex'?",
        ),
        ({"evaluation": {"reward": {"name": "vibes"}}}, "evaluation.reward.name", "unknown reward 'vibes'"),
        ({"algorithm": {"loss": "ppo", "loss_params": {"clip": 1.0}}}, "algorithm.loss_params.clip", "clip_high"),
        (
            {"algorithm": {"loss": "ppo", "loss_params": {"clip_low": 2.0, "clip_high": 1.0}}},
            "algorithm.loss_params",
            "ppo: clip_low 2 must be from 0 to clip_high 1",
        ),
        ({"algorithm": {"loss": "ppo", "loss_params": {"clip_low": 1.5}}}, "algorithm.loss_params", "clip_high 1.2"),
        ({"algorithm": {"loss": "dro", "loss_params": {"beta": -1.0}}}, "algorithm.loss_params", "beta is -1"),
        (
            {"algorithm": {"loss": "stable_reinforce", "loss_params": {"beta": 1.0}}},
            "algorithm.loss_params.beta",
            "unknown for stable_reinforce; known: clip_high, kl_coeff",
        ),
        (
            {"algorithm": {"loss": "importance_sampling", "loss_params": {"kl_coeff": 1.0}}},
            "algorithm.loss_params.kl_coeff",
            "known: none",
        ),
        (
            {"sampling": {"temperature": 0.7}},
            "sampling.temperature",
            "0.7: log-probabilities are trained at temperature 1",
        ),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens", "leaves nothing to train on"),
        ({"sampling": {"seed": 1}}, "sampling.seed", "set `seed`"),
        ({"sampling": {"stop": ["\n", ""]}}, "sampling.stop[1]", "'' stands everywhere"),
        ({"sampling": {"stop": [-1]}}, "sampling.stop[0]", "-1 is no token id"),
        ({"sampling": {"max_tokens": 2048}}, "sampling.max_tokens", "no room for a prompt in the context of 2048"),
        ({"evaluation": {"max_tokens": 4096}}, "evaluation.max_tokens", "4096 leaves no room"),
        ({"lora": {"train_attn": False, "train_mlp": False}}, "lora", "leaves nothing to train"),
        ({"algorithm": {"group_size": 1}}, "algorithm.group_size", ">= 2, got 1"),
        ({"algorithm": {"learning_rate": float("nan")}}, "algorithm.learning_rate", "got nan"),
        ({"algorithm": {"learning_rate": float("inf")}}, "algorithm.learning_rate", "<= 10.0, got inf"),
        ({"environment": {"name": "arithmetic", "params": {"max": 2**70}}}, "environment.params.max", "64 bits"),
        ({"lora": {"rank": 1000}}, "lora.rank", "<= 128, got 1000"),
    ],
)
def test_an_error_names_the_field_the_value_and_the_way_out(change: dict[str, Any], path: str, message: str) -> None:
    found = errors_of(job(**change))
    assert list(found) == [path]
    assert message in found[path]


def test_names_and_rules_are_checked_beside_wrong_types() -> None:
    found = errors_of(
        {
            "name": 5,
            "base_model": "gpt",
            "environment": {"name": "chess", "episode_timeout_s": "soon"},
            "reward": {"name": "vibes", "params": []},
            "algorithm": {"steps": "many", "loss": "ppo", "loss_params": {"clip": 1.0}},
            "sampling": {"max_tokens": "few", "temperature": 0.5},
            "evaluation": {"reward": {"params": 3}},
            "lora": {"train_attn": False, "train_mlp": False, "rank": 0},
        }
    )
    assert set(found) == {
        "name", "base_model", "environment.name", "environment.episode_timeout_s", "reward.name", "reward.params",
        "algorithm.steps", "algorithm.loss_params.clip", "sampling.max_tokens", "sampling.temperature",
        "evaluation.reward.name", "evaluation.reward.params", "lora.rank",
    }  # fmt: skip


def test_nothing_is_said_of_what_stands_in_for_a_wrong_value() -> None:
    wrong = {"name": "x", "base_model": 3, "environment": [], "reward": {"name": 4}, "algorithm": {"loss_params": 1}}
    assert set(errors_of(wrong)) == {"base_model", "environment", "reward.name", "algorithm.loss_params"}


def asked(data: Any) -> dict[str, Any]:
    draft = read(data)
    return {question.path: question for question in questions(draft, check(draft, LIVING), lambda: "r")}


def test_environment_and_rewards_are_asked_about_parameters_as_far_as_they_can_be_read() -> None:
    complete = job(
        environment={"name": "arithmetic", "params": {"min": 1}},
        evaluation={"tasks": 5, "reward": {"name": "regex", "params": {"pattern": "a"}}},
        seed=3,
    )
    environment = CheckEnvironment(request_id="r", name="arithmetic", params={"min": 1}, seed=3, held_out=5)
    regex = CheckReward(request_id="r", name="regex", params={"pattern": "a"}, path="evaluation.reward")
    reward = CheckReward(request_id="r", name="exact_match")
    assert asked(complete) == {"environment": environment, "reward": reward, "evaluation.reward": regex}
    assert set(asked(complete | {"base_model": 3, "algorithm": {"steps": 0}})) == set(asked(complete))
    unknown = complete | {"environment": {"name": "chess"}, "reward": {"name": "exact_match", "params": []}}
    assert set(asked(unknown)) == {"evaluation.reward"}
    assert asked("no job") == {}


def test_of_two_errors_at_one_place_the_first_is_told() -> None:
    errors = [FieldError(path="a", message="1"), FieldError(path="b", message="2"), FieldError(path="a", message="3")]
    assert merged(errors) == errors[:2]


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_no_object_is_refused(data: Any) -> None:
    assert list(errors_of(data)) == [""]


def test_without_services_the_answer_says_which_are_missing() -> None:
    errors = check(read(job()), [])
    assert (
        FieldError(path="environment.name", message="no environment service is running: see `openrl status`") in errors
    )
    assert {error.path for error in errors} == {"environment.name", "reward.name", "base_model"}
