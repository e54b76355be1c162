"""What a trainer does next, decided without an engine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.trainer.policy import Backlog, Offered, next_turn
from shared.contracts.arrays import Int32s
from shared.contracts.training import AnyOperation, Datum, ForwardBackward, LossSpec, OptimStep, SavePolicy


def train(run: str, tokens: int, seq: int = 1) -> ForwardBackward:
    datum = Datum(tokens=Int32s([1] * tokens), targets=Int32s([1] * tokens))
    return ForwardBackward(run=run, seq=seq, request_id="q", data=[datum], loss=LossSpec(name="cross_entropy"))


def step(run: str) -> OptimStep:
    return OptimStep(run=run, seq=2, request_id="q")


@given(st.permutations(range(8)))
def test_operations_are_executed_in_seq_order_however_they_come(order: list[int]) -> None:
    backlog: Backlog[int] = Backlog()
    executed: list[int] = []
    for place, seq in enumerate(order, start=1):
        assert backlog.offer(seq, seq, place) is Offered.WAITING
        while (head := backlog.head) is not None:
            executed.append(head)
            backlog.done()
    assert executed == list(range(8))
    assert backlog.replay_from == 8


@given(st.permutations(range(6)), st.integers(0, 6))
def test_a_replay_from_the_snapshot_misses_nothing(order: list[int], executed: int) -> None:
    backlog: Backlog[int] = Backlog()
    for place, seq in enumerate(order, start=1):
        backlog.offer(seq, seq, place)
    for _ in range(executed):
        backlog.done()
    replayed = {seq for place, seq in enumerate(order, start=1) if place > backlog.replay_from}
    assert replayed >= set(range(executed, 6))


def test_what_was_done_before_is_told_from_what_is_new() -> None:
    backlog: Backlog[str] = Backlog(next_seq=3)
    assert backlog.offer(2, "old", 1) is Offered.DONE_BEFORE
    assert backlog.offer(3, "new", 2) is Offered.WAITING
    assert backlog.offer(3, "again", 3) is Offered.REPEATED
    assert backlog.head == "new"


def test_a_missing_seq_holds_up_only_its_run() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.offer(1, "later", 1)
    assert backlog.head is None


def test_nothing_to_do_is_no_turn() -> None:
    assert next_turn({}, {}, 100) is None


def test_saving_goes_before_steps_and_steps_before_passes() -> None:
    heads: dict[str, AnyOperation] = {
        "a": train("a", 5),
        "b": step("b"),
        "c": SavePolicy(run="c", seq=3, request_id="q", version=1),
        "d": step("d"),
    }
    turn = next_turn(heads, {}, 100)
    assert turn is not None
    assert turn.single == "c"
    del heads["c"]
    turn = next_turn(heads, {}, 100)
    assert turn is not None
    assert turn.steps == ("b", "d")


def test_a_pass_takes_runs_up_to_its_budget_least_recently_served_first() -> None:
    heads: dict[str, AnyOperation] = {name: train(name, 40) for name in "abcd"}
    turn = next_turn(heads, {"a": 4.0, "b": 1.0, "c": 3.0, "d": 2.0}, 100)
    assert turn is not None
    assert turn.shared_pass == ("b", "d")


def test_a_run_larger_than_the_budget_is_not_left_out() -> None:
    turn = next_turn({"a": train("a", 500)}, {}, 100)
    assert turn is not None
    assert turn.shared_pass == ("a",)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 120), min_size=1))
def test_every_waiting_run_is_served_within_as_many_passes_as_there_are_runs(sizes: dict[str, int]) -> None:
    served: dict[str, float] = {}
    for clock in range(len(sizes)):
        turn = next_turn({name: train(name, size) for name, size in sizes.items()}, served, 100)
        assert turn is not None
        served.update(dict.fromkeys(turn.shared_pass, float(clock + 1)))
    assert set(served) == set(sizes)
