"""Environments without a service: tasks, splits, prompts, plugins."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.environment import policy
from services.environment.api import Environment, Play, Step, Task
from services.environment.builtin.arithmetic import Arithmetic, ArithmeticParams
from services.environment.registry import Registry
from services.environment.shuffle import permuted
from shared.contracts.episodes import EnvironmentSpec, GroupKey, Message, PlayGroup, RewardSpec
from shared.contracts.sampling import SamplingParams
from shared.errors import UserError

REGISTRY = Registry.load([])
PATIENT = settings(deadline=None, max_examples=50)
"""A busy machine is no failure."""


def make(name: str, **params: Any) -> Environment[Any]:
    return REGISTRY.make(EnvironmentSpec(name=name, params=params))


def play_group(seed: int | None = None, task_seed: int = 1, index: int = 0, round_: int = 0) -> PlayGroup:
    return PlayGroup(
        job="job",
        group=GroupKey(split="train", index=index, round=round_),
        environment=EnvironmentSpec(name="arithmetic"),
        reward=RewardSpec(name="numeric"),
        base_model="tiny",
        sampling=SamplingParams(seed=seed),
        size=2,
        task_seed=task_seed,
    )


# -- order and seeds -------------------------------------------------------------------------------------------------


@PATIENT
@given(size=st.integers(1, 600), key=st.text(max_size=5))
def test_a_shuffle_takes_every_number_once(size: int, key: str) -> None:
    assert sorted(permuted(place, size, key) for place in range(size)) == list(range(size))


@PATIENT
@given(size=st.integers(1, 10**40), data=st.data())
def test_a_shuffle_of_any_size_stays_inside(size: int, data: st.DataObject) -> None:
    assert 0 <= permuted(data.draw(st.integers(0, size - 1)), size, "key") < size


def test_shuffles_of_different_keys_differ_and_one_is_the_same_for_ever() -> None:
    first = [permuted(place, 10, "0/0") for place in range(10)]
    assert first != [permuted(place, 10, "0/1") for place in range(10)]
    assert first != list(range(10))
    assert first == [9, 8, 0, 1, 7, 5, 6, 4, 2, 3]


@PATIENT
@given(size=st.integers(1, 50), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_training_goes_through_all_tasks_before_it_repeats_one(size: int, seed: int, epoch: int) -> None:
    groups = (GroupKey(split="train", index=epoch * size + place) for place in range(size))
    assert sorted(policy.task_number("e", size, key, seed) for key in groups) == list(range(size))


def test_a_group_that_is_asked_for_again_has_the_same_task() -> None:
    again = [policy.task_number("e", 100, GroupKey(split="train", index=5, round=n), 3) for n in range(3)]
    assert len(set(again)) == 1


def test_evaluation_takes_tasks_as_they_come_and_no_more_than_there_are() -> None:
    key = GroupKey(split="held_out", index=7, round=40)
    assert policy.task_number("e", 8, key, 3) == 7
    assert policy.task_number("e", None, key, 3) == 7
    with pytest.raises(UserError, match=r"'e' has 7 held-out tasks.*set evaluation.tasks to 7 or less"):
        policy.task_number("e", 7, key, 3)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_empty_data_set_is_an_error_that_says_so(split: Any) -> None:
    with pytest.raises(UserError, match=f"'e' has no {split} tasks"):
        policy.task_number("e", 0, GroupKey(split=split, index=0), 3)


def test_every_request_of_a_job_draws_from_a_seed_of_its_own_and_the_same_again() -> None:
    def seeds(group: PlayGroup) -> list[int]:
        later = [policy.request_seed(group, episode, turn) for episode in range(3) for turn in range(1, 4)]
        return [policy.request_seed(group, None, 0), *later]

    groups = [play_group(), play_group(index=1), play_group(round_=1), play_group(task_seed=2), play_group(seed=0)]
    every = [seed for group in groups for seed in seeds(group)]
    assert len(set(every)) == len(every)
    assert all(0 <= seed < 2**31 for seed in every)
    assert every == [seed for group in groups for seed in seeds(group)]
    assert seeds(play_group(seed=5, task_seed=1)) == seeds(play_group(seed=5, task_seed=2))


# -- prompts ---------------------------------------------------------------------------------------------------------


def rendered_anew() -> list[int]:
    raise AssertionError("the template is consistent: nothing is to be rendered anew")


def test_the_next_prompt_keeps_the_tokens_that_were_sampled() -> None:
    # The template's rendering (50) of the reply is not what was sampled (61, 62), and does not appear.
    prompt = policy.next_prompt([1, 2], array("i", [61, 62, 9]), [1, 2], [1, 2, 9, 3, 4], rendered_anew)
    assert prompt == [1, 2, 61, 62, 9, 3, 4]


def test_a_reply_that_was_cut_off_is_ended_by_the_template() -> None:
    assert policy.next_prompt([1, 2], [61, 62], [1, 2], [1, 2, 9, 3, 4], rendered_anew) == [1, 2, 61, 62, 9, 3, 4]


def test_an_empty_reply_is_ended_by_the_template() -> None:
    assert policy.next_prompt([1, 2], [], [1, 2], [1, 2, 9, 3], rendered_anew) == [1, 2, 9, 3]


def test_earlier_turns_stay_as_they_were_when_the_template_would_render_them_otherwise() -> None:
    second = policy.next_prompt([1, 2, 61, 9, 3], [71, 9], [1, 2, 50, 9, 3], [1, 2, 50, 9, 3, 9, 4], rendered_anew)
    assert second == [1, 2, 61, 9, 3, 71, 9, 4]


def test_a_template_that_rewrites_what_came_earlier_is_rendered_anew() -> None:
    assert policy.next_prompt([1, 2], [61], [1, 2], [8, 2, 9], lambda: [7, 7]) == [7, 7]


# -- what environments give ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "wrong"),
    [
        (None, "returned None: step\\(\\) must return a Step"),
        (Step(done=False), "neither ended the episode nor said anything"),
        (Step(done=False, messages=[Message(role="assistant", content="x")]), "messages are Message from user"),
        (Step(done=False, messages=["hello"]), "messages are Message from user"),  # type: ignore[list-item]
        (Step(done=True, reward=float("nan")), "gave the reward nan: a finite number"),
        (Step(done=True, reward="1"), "gave the reward '1': a finite number"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_step_is_named(step: object, wrong: str) -> None:
    with pytest.raises(UserError, match=f"environment 'mine' in turn 3 {wrong}|environment 'mine' in turn 3 .*{wrong}"):
        policy.checked_step("mine", step, 3)


def test_rewards_of_steps_add_up_and_none_is_no_reward() -> None:
    so_far = None
    for reward, expected in ((None, None), (0.5, 0.5), (None, 0.5), (-1, -0.5)):
        so_far = policy.total(so_far, Step(done=False, reward=reward))
        assert so_far == expected


# -- arithmetic ------------------------------------------------------------------------------------------------------


@st.composite
def arithmetic(draw: st.DrawFn) -> Arithmetic:
    low = draw(st.integers(-3, 3))
    params = ArithmeticParams(
        operations=tuple(draw(st.lists(st.sampled_from("+-*"), min_size=1, unique=True))),
        operands=draw(st.integers(2, 3)),
        min=low,
        max=low + draw(st.integers(1, 4)),
        held_out=draw(st.integers(0, 3)),
    )
    return Arithmetic(params)


@PATIENT
@given(environment=arithmetic(), seeds=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_held_out_expressions_are_never_trained_on(environment: Arithmetic, seeds: tuple[int, int]) -> None:
    train = {environment.task("train", n, seeds[0]).question for n in range(environment.size("train"))}
    held_out = {environment.task("held_out", n, seeds[1]).question for n in range(environment.size("held_out"))}
    assert not train & held_out
    assert len(train) + len(held_out) == environment.size("train") + environment.size("held_out")


@PATIENT
@given(environment=arithmetic())
def test_answers_are_the_values_of_the_expressions(environment: Arithmetic) -> None:
    for number in range(min(20, environment.size("train"))):
        task = environment.task("train", number, 0)
        assert task.question == f"What is {task.metadata['expression']}? Reply with the number only."
        assert task.answer == str(eval(task.metadata["expression"]))


def test_a_space_too_large_to_list_has_tasks_at_once() -> None:
    environment = make("arithmetic", operations=["+", "-", "*"], operands=4, min=0, max=10**9, held_out=10_000)
    assert environment.size("train") == 27 * (10**9 + 1) ** 4 - 10_000
    assert environment.task("train", 10**20, 0) != environment.task("held_out", 9_999, 0)


def test_each_operand_can_have_a_range_of_its_own() -> None:
    environment = make(
        "arithmetic", operands=3, min=[1, 20, 300], max=[2, 21, 301], held_out=0, template="{expression}="
    )
    assert environment.size("train") == 8
    assert {environment.task("train", n, 0).question for n in range(8)} == {
        f"{a} + {b} + {c}=" for a in (1, 2) for b in (20, 21) for c in (300, 301)
    }


def test_a_system_message_opens_the_conversation() -> None:
    environment = make("arithmetic", system="Be brief.")
    opening = environment.start(environment.task("train", 0, 0))
    assert [message.role for message in opening] == ["system", "user"]


def test_a_prefill_begins_the_reply() -> None:
    environment = make("arithmetic", prefill="{expression} =")
    task = environment.task("train", 0, 0)
    assert environment.start(task)[-1] == Message(role="assistant", content=f"{task.metadata['expression']} =")


def test_sums_without_carry_are_all_sums_without_carry() -> None:
    environment = make("arithmetic", min=10, max=99, carry=False)
    training = environment.size("train")
    assert training is not None
    tasks = [environment.task("held_out", n, 0) for n in range(256)]
    tasks += [environment.task("train", n, 0) for n in range(training)]
    pairs = {tuple(map(int, task.metadata["expression"].split(" + "))) for task in tasks}
    expected = {
        (a, b) for a in range(10, 100) for b in range(10, 100) if a % 10 + b % 10 < 10 and a // 10 + b // 10 < 10
    }
    assert pairs == expected
    assert len(tasks) == len(expected) == 1980


@pytest.mark.parametrize(
    ("params", "wrong"),
    [
        ({"carry": False, "operations": ["-"]}, r"carry = false is for sums .* here operations = \['-'\]"),
        ({"carry": False, "max": 9999}, "100,000,000 expressions"),
        ({"max": 9}, "only 100 expressions with these parameters, and held_out = 256 leaves none to train on"),
        ({"min": 5, "max": 4}, "from 5 to 4 is impossible"),
        ({"min": [1, 2, 3]}, "min has 3 numbers for operands = 2"),
        ({"template": "What?"}, "does not hold {expression}"),
        ({"operands": 5}, r"`int` <= 4 - at `environment.params.operands`"),
        ({"operations": ["/"]}, r"Invalid enum value '/' - at `environment.params.operations\[0\]`"),
        ({"operations": []}, "length >= 1"),
        ({"maximum": 3}, "has no parameter 'maximum': it has operations, operands, min, max"),
    ],
)
def test_arithmetic_names_a_wrong_parameter(params: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        make("arithmetic", **params)


# -- guess_number ----------------------------------------------------------------------------------------------------


def guessing(replies: list[str], **params: Any) -> tuple[list[str], Step]:
    environment = make("guess_number", **params)
    play = Play(task=Task(question="", answer="42"), messages=())
    said: list[str] = []
    for turn, reply in enumerate(replies):
        play.turn = turn
        step = environment.step(play, reply)
        said += [message.content for message in step.messages]
    return said, step


def test_guessing_is_told_higher_and_lower_and_rewarded_at_the_end() -> None:
    said, last = guessing(["I say 50!", "What about 7", "hm", "It is 42."])
    assert said == ["My number is lower.", "My number is higher.", "Reply with one whole number."]
    assert last == Step(done=True, reward=1.0)


def test_guessing_ends_without_reward_when_the_turns_are_used_up() -> None:
    assert guessing(["1", "41"], max_turns=2) == (["My number is higher."], Step(done=True, reward=0.0))


def test_a_shaped_reward_grows_with_closeness_but_stays_below_finding_it() -> None:
    rewards = [guessing([reply], max_turns=1, shaped=True)[1].reward or 0.0 for reply in ("no", "900", "1", "41", "42")]
    assert rewards[:2] == [0.0, 0.0]
    assert rewards == sorted(rewards)
    assert rewards[3] < 0.5 < rewards[4]


def test_numbers_to_guess_are_held_out_from_training() -> None:
    environment = make("guess_number", low=-5, high=14)
    answers = {
        split: {environment.task(split, n, 0).answer for n in range(environment.size(split) or 0)}
        for split in ("train", "held_out")
    }
    assert len(answers["held_out"]) == 2
    assert answers["train"] | answers["held_out"] == {str(number) for number in range(-5, 15)}
    assert not answers["train"] & answers["held_out"]


def test_a_range_with_nothing_to_guess_is_refused() -> None:
    with pytest.raises(UserError, match="has 1 numbers from low = 3 to high = 3, and 1 of them held out"):
        make("guess_number", low=3, high=3)


# -- reasoning_gym ---------------------------------------------------------------------------------------------------


def test_a_reasoning_gym_data_set_gives_tasks_and_judges_replies() -> None:
    environment = make("reasoning_gym", dataset="leg_counting", config={"max_animals": 4}, size=20, held_out=5)
    task = environment.task("train", 3, 0)
    assert task == environment.task("train", 3, 99)
    assert task.metadata == {"dataset": "leg_counting", "index": 8}
    play = Play(task=task, messages=())
    assert environment.step(play, f" {task.answer}\n") == Step(done=True, reward=1.0)
    assert environment.step(play, "-1") == Step(done=True, reward=0.0)


def test_a_small_data_set_keeps_its_held_out_questions_from_training() -> None:
    environment = make("reasoning_gym", dataset="leg_counting", size=60, held_out=20, config={
        "max_animals": 1, "min_animals": 1, "max_instances": 2})  # fmt: skip
    questions = {
        split: {environment.task(split, n, 0).question for n in range(environment.size(split) or 0)}
        for split in ("train", "held_out")
    }
    assert questions["train"]
    assert not questions["train"] & questions["held_out"]


def test_a_data_set_of_a_single_question_cannot_be_split() -> None:
    environment = make("reasoning_gym", dataset="coin_flip", size=3, config={"min_trials": 3, "max_trials": 3})
    with pytest.raises(UserError, match="are held-out questions: widen its config, or lower held_out"):
        environment.task("train", 0, 0)


def test_an_answer_is_taken_from_its_tag() -> None:
    environment = make("reasoning_gym", dataset="leg_counting", answer_tag="answer", template="Q: {question}")
    task = environment.task("held_out", 0, 0)
    assert task.question.startswith("Q: Your task is to count")
    play = Play(task=task, messages=())
    reply = f"<answer>1</answer> no: <answer> {task.answer} </answer>."
    assert environment.step(play, reply).reward == 1.0
    assert environment.step(play, task.answer or "").reward == 0.0


def test_a_reply_that_the_data_set_chokes_on_is_a_wrong_answer() -> None:
    environment = make("reasoning_gym", dataset="prime_factorization")
    play = Play(task=environment.task("train", 0, 0), messages=())
    assert environment.step(play, "seven times two") == Step(done=True, reward=0.0)


@pytest.mark.parametrize(
    ("params", "wrong"),
    [
        ({"dataset": "leg_count"}, r"'leg_count' is unknown: the closest of its \d+ are leg_counting"),
        ({"dataset": "leg_counting", "config": {"legs": 3}}, r"refuses config {'legs': 3}.*unexpected keyword.*'legs'"),
        ({"dataset": "leg_counting", "config": {"min_animals": 0}}, "min_animals must be positive"),
        ({"dataset": "leg_counting", "config": {"seed": 0}}, "set seed beside config, not in it"),
        ({"dataset": "leg_counting", "size": 0}, r"`int` >= 1 - at `environment.params.size`"),
        ({"dataset": "leg_counting", "template": "?"}, "does not hold {question}"),
        ({}, "missing required field `dataset`"),
    ],
)
def test_reasoning_gym_names_a_wrong_parameter(params: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        make("reasoning_gym", **params)
