"""Rewards without a service: what each gives, mixtures, parameters, plugins, and the scoring process's loop."""

from __future__ import annotations

import io
import math
import sys
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.reward import child
from services.reward.answers import final_answer, same_value
from services.reward.api import PlayedEpisode, checked_by
from services.reward.policy import component_names, finite, played
from services.reward.protocol import (
    LENGTH,
    Answer,
    Check,
    Checked,
    Prepare,
    Question,
    Ready,
    Refused,
    Score,
    Scored,
    frame,
)
from services.reward.registry import FAMILY, Registry
from shared import wire
from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.episodes import Episode, GroupKey, Message, RewardSpec, ScoreGroup, Task, Turn
from shared.errors import UserError

REGISTRY = Registry.load([])
PATIENT = settings(deadline=None, max_examples=50)
"""A busy machine is no failure."""


def episode(reply: str = "", answer: str | None = None, **fields: Any) -> PlayedEpisode:
    return PlayedEpisode(task=Task(question="?", answer=answer), reply=reply, **fields)


def score(name: str, of: PlayedEpisode, /, **params: Any) -> float:
    return REGISTRY.scorer(name, params).score(of)[0]


# -- built in --------------------------------------------------------------------------------------------------------


def test_exact_match_leaves_out_blanks_and_case_only_if_asked() -> None:
    assert score("exact_match", episode(" Paris\n", "Paris")) == 1
    assert score("exact_match", episode("paris", "Paris")) == 0
    assert score("exact_match", episode("paris", "Paris"), case_insensitive=True) == 1


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("9 + 8 = 17", "17"),
        ("The answer is -5.", "-5"),
        ("It is \N{MINUS SIGN}5", "-5"),
        ("5-3", "3"),
        ("12 - 7", "7"),
        ("Half of it: 1/2", "0.5"),
        ("0.50", "1/2"),
        (r"so \boxed{\frac{1}{2}} or 3", "0.5"),
        (r"it is $-\dfrac{3}{6}$", "-1/2"),
        ("1,234.5 in all", "1234.5"),
        ("the pair 1,2", "2"),
        ("**12**", "12"),
        ("$42.00", "42"),
        ("1e3", "1000"),
        ("50%", "0.5"),
        ("50%", "50"),
        ("17", r"\boxed{17}"),
        ("0.33333333", "1/3"),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
        (r"\boxed{2x + 2}", r"$2(x+1)$"),
        (r"\boxed{\text{yes}}", r"\text{yes}"),
        ("7", " 7 "),
    ],
)
def test_numeric_accepts_another_way_to_write_the_same_value(reply: str, answer: str) -> None:
    assert score("numeric", episode(reply, answer)) == 1


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("", "5"),
        ("none", "5"),
        ("5", "-5"),
        ("17 or 18", "17"),
        ("12/0", "5"),
        ("x5", "5"),
        ("123456790", "123456789"),
        ("0.34", "1/3"),
        (r"\boxed{\sqrt{2}}", "2"),
        (r"\boxed{" + "9^{9^{9}}" * 40 + "}", "5"),
        ("9" * 100_000, "5"),
        (r"\boxed{17", "18"),
    ],
)
def test_numeric_refuses_another_value(reply: str, answer: str) -> None:
    assert score("numeric", episode(reply, answer)) == 0


def test_numeric_takes_a_wider_tolerance_for_what_is_not_whole() -> None:
    assert score("numeric", episode("3.14", "3.14159")) == 0
    assert score("numeric", episode("3.14", "3.14159"), tolerance=0.01) == 1
    assert score("numeric", episode("3", "4"), tolerance=0.5) == 0


@PATIENT
@given(st.fractions(max_denominator=10**6))
def test_every_fraction_is_found_behind_words_and_equals_itself(value: Fraction) -> None:
    found = final_answer(f"First 3, then 4: {value}.")
    assert found == str(value)
    assert same_value(found, str(value), 0.0)


@PATIENT
@given(st.text())
def test_no_reply_makes_numeric_fail(reply: str) -> None:
    assert score("numeric", episode(reply, "x")) in (0, 1)


def test_regex_matches_the_whole_reply_or_something_in_it() -> None:
    assert score("regex", episode("<a>\n</a> "), pattern="<a>.*</a>") == 1
    assert score("regex", episode("so <a></a>"), pattern="<a>.*</a>") == 0
    assert score("regex", episode("so <a></a>"), pattern="<a>.*</a>", match="search") == 1


def test_an_impossible_pattern_is_refused_before_anything_is_scored() -> None:
    with pytest.raises(UserError, match=r"pattern '\(' is not a regular expression: missing \)"):
        REGISTRY.scorer("regex", {"pattern": "("})


def test_length_costs_beyond_the_budget_and_down_to_the_floor() -> None:
    params = {"budget": 10, "per_token": 0.25, "floor": -2.0}
    assert [score("length_penalty", episode(tokens=n), **params) for n in (0, 10, 11, 14, 18, 10**6)] == [
        0, 0, -0.25, -1, -2, -2
    ]  # fmt: skip


def test_the_environment_can_be_the_judge_if_it_judges() -> None:
    assert score("environment", episode(environment_reward=0.25)) == 0.25
    with pytest.raises(UserError, match="the environment gave no reward of its own: choose another"):
        score("environment", episode())


@pytest.mark.parametrize("name", ["exact_match", "numeric"])
def test_a_task_without_an_answer_cannot_be_compared(name: str) -> None:
    with pytest.raises(UserError, match=f"reward '{name}': the task has no answer to compare with"):
        score(name, episode("5"))


# -- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_weighs_its_parts_and_reports_each_before_its_weight() -> None:
    parts = [
        {"name": "numeric", "weight": 2.0},
        {"name": "regex", "weight": 0.5, "params": {"pattern": r"\d+"}},
        {"name": "regex", "weight": -1.0, "params": {"pattern": "7", "match": "search"}},
        {"name": "length_penalty", "params": {"budget": 0, "per_token": 0.1}},
    ]
    scorer = REGISTRY.scorer("weighted", {"parts": parts})
    total, components = scorer.score(episode("17", "17", tokens=3))
    assert components == pytest.approx({"numeric": 1.0, "regex": 1.0, "regex_2": 1.0, "length_penalty": -0.3})
    assert total == pytest.approx(2.0 + 0.5 - 1.0 - 0.3)


def test_a_single_reward_reports_no_parts() -> None:
    assert REGISTRY.scorer("numeric", {}).score(episode("5", "5")) == (1.0, {})


@pytest.mark.parametrize(
    ("params", "wrong"),
    [
        ({}, "missing required field `parts`"),
        ({"parts": []}, "length >= 1 - at `reward.params.parts`"),
        ({"parts": [{"weight": 1}]}, r"missing required field `name` - at `reward.params.parts\[0\]`"),
        ({"parts": [{"name": "numeric", "wait": 1}]}, "unknown field `wait`"),
        ({"parts": [{"name": "numerical"}]}, "'numerical' is unknown: did you mean 'numeric'"),
        ({"parts": [{"name": "weighted"}]}, "cannot be 'weighted' again"),
        (
            {"parts": [{"name": "numeric"}, {"name": "length_penalty", "params": {"budget": -1}}]},
            r"`int` >= 0 - at `reward.params.parts\[1\].params.budget`",
        ),
    ],
)
def test_a_wrong_mixture_is_named(params: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        REGISTRY.scorer("weighted", params)


def errors_of(name: str, params: object) -> dict[str, str]:
    return {error.path: error.message for error in REGISTRY.errors(name, params, "reward")}


@pytest.mark.parametrize(
    ("name", "params", "wrong"),
    [
        ("vibes", {}, {"reward.name": "is unknown"}),
        ("exact_match", {}, {}),
        ("exact_match", [], {"reward.params": "Expected `object`, got `array`"}),
        ("exact_match", {"case_insensitiv": 1}, {"reward.params.case_insensitiv": "did you mean 'case_insensitive'?"}),
        ("regex", {}, {"reward.params.pattern": "is required"}),
        ("regex", {"pattern": "("}, {"reward.params": "'(' is not a regular expression: missing )"}),
        (
            "regex",
            {"pattern": 3, "match": "some", "flags": "i"},
            {
                "reward.params.pattern": "got `int`",
                "reward.params.match": "none of full, search",
                "reward.params.flags": "",
            },
        ),
        ("weighted", {}, {"reward.params.parts": "is required"}),
        ("weighted", {"parts": []}, {"reward.params.parts": "length >= 1"}),
        (
            "weighted",
            {"parts": [{"name": "vibes", "weight": "much"}, {"name": "regex", "params": {"pattern": "["}}, {}]},
            {
                "reward.params.parts[0].name": "is unknown",
                "reward.params.parts[0].weight": "Expected `float`",
                "reward.params.parts[1].params": "is not a regular expression",
                "reward.params.parts[2].name": "is required",
            },
        ),
        ("weighted", {"parts": [{"name": "weighted"}]}, {"reward.params.parts[0].name": "all parts in one list"}),
    ],
)
def test_everything_that_is_wrong_with_a_reward_is_found_at_once(
    name: str, params: object, wrong: dict[str, str]
) -> None:
    found = errors_of(name, params)
    assert found.keys() == wrong.keys()
    for path, message in wrong.items():
        assert message in found[path]


def test_parts_of_the_same_name_are_numbered() -> None:
    assert component_names(["a", "b", "a", "a"]) == ["a", "b", "a_2", "a_3"]


# -- what counts as a number -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1", 1j, [1.0]])
def test_what_is_no_finite_number_is_refused_by_name_and_value(value: object) -> None:
    with pytest.raises(UserError, match=r"reward 'mine' gave .*: a reward must be a finite number") as error:
        finite("mine", value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("value", "number"), [(True, 1.0), (3, 3.0), (Fraction(1, 2), 0.5), (-0.5, -0.5)])
def test_whatever_is_a_number_counts(value: object, number: float) -> None:
    assert finite("mine", value) == number


def test_a_mixture_that_overflows_is_refused() -> None:
    def large(_: PlayedEpisode) -> float:
        return 1e308

    parts = [{"name": "large", "weight": 5.0}, {"name": "large", "weight": 5.0}]
    with pytest.raises(UserError, match="reward 'weighted' gave inf"):
        Registry({"large": large}).scorer("weighted", {"parts": parts}).score(episode())


# -- plugins ---------------------------------------------------------------------------------------------------------


def test_a_reward_that_raises_is_named_with_what_it_raised() -> None:
    def mine(_: PlayedEpisode) -> float:
        return 1 / 0

    with pytest.raises(UserError, match="reward 'mine' raised ZeroDivisionError: division by zero"):
        Registry({"mine": mine}).scorer("mine", {}).score(episode())


def test_parameters_of_a_reward_are_checked_by_their_annotations_and_by_its_own_check() -> None:
    def check(low: int, high: int) -> None:
        if low > high:
            raise UserError("low must not be above high")

    @checked_by(check)
    def mine(of: PlayedEpisode, low: int, high: int = 9) -> float:
        return low * 10 + high

    registry = Registry({"mine": mine})
    assert registry.scorer("mine", {"low": 2}).score(episode())[0] == 29
    for params, wrong in (
        ({"low": 10}, "low must not be above high"),
        ({"low": "x"}, "Expected `int`, got `str` - at `reward.params.low`"),
        ({"low": 1, "middle": 3}, "reward 'mine' has no parameter 'middle': it has low, high"),
    ):
        with pytest.raises(UserError, match=wrong):
            registry.scorer("mine", params)


def test_an_object_that_can_be_called_is_a_reward() -> None:
    class Constant:
        def __call__(self, of: PlayedEpisode, value: float = 0.5) -> float:
            return value

    assert Registry({"constant": Constant()}).scorer("constant", {"value": 0.75}).score(episode())[0] == 0.75


def test_what_is_built_in_is_what_the_package_registers() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["openrl.rewards"] == FAMILY.builtin


def test_an_unknown_reward_is_told_with_what_there_is() -> None:
    everything = "environment, exact_match, length_penalty, numeric, regex, weighted"
    with pytest.raises(UserError, match=f"'exact' is unknown: .*There are {everything}"):
        REGISTRY.scorer("exact", {})


def test_broken_plugins_are_named_and_the_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward_raising.py").write_text("raise RuntimeError('no licence')")
    (tmp_path / "reward_fine.py").write_text(
        "def fine(episode):\n    return 1\n"
        "def nothing():\n    pass\n"
        "def open_end(episode, **params):\n    pass\n"
        "n = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = {
        "raising": "reward_raising:x", "absent": "reward_fine:x", "nothing": "reward_fine:nothing",
        "open_end": "reward_fine:open_end", "number": "reward_fine:n", "numeric": "reward_fine:fine",
        "weighted": "reward_fine:fine", "fine": "reward_fine:fine",
    }  # fmt: skip
    registry = Registry.load([f"{name}={target}" for name, target in plugins.items()])
    assert set(registry.names) == {*REGISTRY.names, "fine"}
    assert set(registry.broken) == set(plugins) - {"fine"}
    with pytest.raises(UserError, match="reward 'raising' could not be loaded .*RuntimeError: no licence"):
        registry.scorer("raising", {})
    sys.modules.pop("reward_fine", None)


# -- what a reward sees ----------------------------------------------------------------------------------------------


def test_a_reward_sees_the_last_reply_and_how_long_the_episode_was() -> None:
    turns = [
        Turn(prompt=Int32s([1]), tokens=Int32s([2, 2, 2]), logprobs=Float32s([0, 0, 0]), stop_reason="stop"),
        Turn(prompt=Int32s([1]), tokens=Int32s([2, 2, 2, 2]), logprobs=Float32s([0, 0, 0, 0]), stop_reason="length"),
    ]
    said = [Message(role=role, content=role + str(n)) for n in (1, 2) for role in ("user", "assistant")]
    group = ScoreGroup(
        job="j",
        group=GroupKey(split="train", index=0),
        reward=RewardSpec(name="numeric"),
        task=Task(question="q", answer="a"),
        episodes=[Episode(turns=turns, messages=said, reply="what it said", environment_reward=0.5)],
    )
    seen = played(group, group.episodes[0])
    assert (seen.reply, seen.turns, seen.tokens, seen.truncated) == ("what it said", 2, 7, True)
    assert (seen.task.answer, seen.environment_reward, seen.messages) == ("a", 0.5, said)


# -- the scoring process ---------------------------------------------------------------------------------------------


def test_a_scoring_process_answers_every_question_in_order() -> None:
    questions: list[Question] = [
        Prepare(reward="numeric"),
        Score(reward="numeric", episode=episode("5", "5")),
        Score(reward="numeric", episode=episode("5")),
        Prepare(reward="nothing"),
        Check(reward="regex"),
        Score(reward="regex", params={"pattern": "5"}, episode=episode("5")),
    ]
    output = io.BytesIO()
    child.serve(REGISTRY, io.BytesIO(b"".join(frame(question) for question in questions)), output)
    output.seek(0)
    answers: list[Answer] = []
    while length := output.read(LENGTH.size):
        answers.append(wire.decode(output.read(LENGTH.unpack(length)[0]), Answer, json=False))
    assert [type(answer) for answer in answers] == [Ready, Scored, Refused, Refused, Checked, Scored]
    assert answers[1] == answers[5] == Scored(reward=1.0)
