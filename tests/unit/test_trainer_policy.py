"""What a trainer does next, decided without an engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.backlog import Backlog, Offered
from services.trainer.policy import CHEAP_IN_A_ROW, Head, Scheduler, Turn, sizes_of
from services.trainer.unreadable import seq_of
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


def test_a_message_that_cannot_be_read_uses_up_its_seq() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.offer(1, None, 1)
    backlog.offer(2, "later", 2)
    found = [backlog.head]
    backlog.offer(0, "first", 3)
    backlog.done()
    found.append(backlog.head)
    assert found == [None, "later"]
    assert backlog.offer(1, "mended", 4) is Offered.HOLE
    assert backlog.next_seq == 2


@given(st.permutations(range(8)), st.sets(st.integers(0, 7)))
def test_holes_are_stepped_over_wherever_they_are(order: list[int], holes: set[int]) -> None:
    backlog: Backlog[int] = Backlog()
    executed: list[int] = []
    for place, seq in enumerate(order, start=1):
        backlog.offer(seq, None if seq in holes else seq, place)
        while (head := backlog.head) is not None:
            executed.append(head)
            backlog.done()
    assert executed == [seq for seq in range(8) if seq not in holes]
    assert (backlog.next_seq, backlog.replay_from, backlog.is_stuck) == (8, 8, False)


def test_a_missing_seq_makes_a_backlog_stuck_until_it_comes() -> None:
    backlog: Backlog[str] = Backlog()
    backlog.pass_over(1)
    found = [backlog.is_stuck]
    backlog.offer(1, "later", 2)
    found.append(backlog.is_stuck)
    backlog.skip_missing()
    assert found == [False, True]
    assert backlog.head == "later"


@pytest.mark.parametrize(
    ("msg_id", "body", "seq"),
    [
        ("a/b/7", b"\xff", 7),
        ("", b'{"op": "dance", "run": "a/b", "seq": 3}', 3),
        ("0a1b2c", b'{"op": "optim_step", "run": "a/b", "seq": 4, "adam": {"learning_rate": "much"}}', 4),
        ("other/7", b'{"run": "other", "seq": 3}', None),
        ("a/b/-1", b'{"run": "a/b", "seq": -1}', None),
        ("", b"", None),
    ],
)
def test_a_message_that_cannot_be_read_says_its_seq_by_id_or_body(msg_id: str, body: bytes, seq: int | None) -> None:
    assert seq_of("a/b", msg_id, body, {}) == seq


def heads(**operations: AnyOperation) -> dict[str, Head]:
    return {run: Head(operation, tenant=run) for run, operation in operations.items()}


def turn_of(scheduler: Scheduler, waiting: dict[str, Head]) -> Turn:
    turn = scheduler.next_turn(waiting)
    assert turn is not None
    return turn


def save(run: str) -> SavePolicy:
    return SavePolicy(run=run, seq=3, request_id="q", version=1)


def test_nothing_to_do_is_no_turn() -> None:
    assert Scheduler(100, {}).next_turn({}) is None


def test_saving_goes_before_steps_and_steps_before_passes() -> None:
    waiting = heads(a=train("a", 5), b=step("b"), c=save("c"), d=step("d"))
    scheduler = Scheduler(100, {})
    assert turn_of(scheduler, waiting).single == "c"
    del waiting["c"]
    assert turn_of(scheduler, waiting).steps == ("b", "d")
    del waiting["b"], waiting["d"]
    assert [piece.run for piece in turn_of(scheduler, waiting).pieces] == ["a"]


def test_an_operation_larger_than_the_budget_leaves_room_for_others() -> None:
    scheduler = Scheduler(100, {})
    large = ForwardBackward(
        run="a", seq=1, request_id="q", data=train("a", 40).data * 5, loss=LossSpec(name="cross_entropy")
    )
    waiting = heads(a=large, b=train("b", 15))
    first = {piece.run: piece for piece in turn_of(scheduler, waiting).pieces}
    assert (first["a"].first, first["a"].stop, first["a"].last) == (0, 2, False)
    assert first["b"].last


def test_an_operation_without_data_has_its_turn() -> None:
    empty = ForwardBackward(run="a", seq=1, request_id="q", data=[], loss=LossSpec(name="cross_entropy"))
    (piece,) = turn_of(Scheduler(100, {}), heads(a=empty)).pieces
    assert piece.last
    assert empty.data[piece.first : piece.stop] == []


def test_a_datum_larger_than_the_budget_gets_a_pass_of_its_own() -> None:
    scheduler = Scheduler(100, {})
    waiting = heads(a=train("a", 60), b=train("b", 500))
    runs = [tuple(piece.run for piece in turn_of(scheduler, waiting).pieces) for _ in range(4)]
    assert {("a",), ("b",)} == set(runs)


def test_cheap_operations_without_end_do_not_keep_a_pass_up() -> None:
    scheduler = Scheduler(100, {})
    waiting = heads(a=train("a", 5), b=save("b"), c=step("c"))
    turns = [turn_of(scheduler, waiting) for _ in range(2 * CHEAP_IN_A_ROW + 1)]
    assert all(not turn.pieces for turn in turns[:-1])
    assert turns[-1].pieces
    assert turn_of(scheduler, waiting).single == "b"


SAVE, STEP, TRAIN = "save", "step", "train"


def made(kind: str, run: str, size: int) -> AnyOperation:
    return save(run) if kind == SAVE else step(run) if kind == STEP else train(run, size)


@given(
    st.lists(st.lists(st.sampled_from([SAVE, STEP, TRAIN]), max_size=12), min_size=1, max_size=6),
    st.integers(1, 60),
)
def test_a_step_goes_as_soon_as_its_turn_comes_and_everything_goes_once(logs: list[list[str]], size: int) -> None:
    scheduler = Scheduler(100, {"t0": 3.0})
    left = {f"r{index}": [(kind, made(kind, f"r{index}", size)) for kind in kinds] for index, kinds in enumerate(logs)}
    for _ in range(sum(map(len, logs))):
        waiting = {run: Head(log[0][1], tenant=f"t{int(run[1]) % 2}") for run, log in left.items() if log}
        if (turn := scheduler.next_turn(waiting)) is None:
            break
        ready = [run for run, log in left.items() if log and log[0][0] == STEP]
        if turn.steps:
            assert set(turn.steps) <= set(ready)
        elif turn.pieces and max(map(len, logs)) <= CHEAP_IN_A_ROW:
            assert not ready, "no pass goes before a step whose turn has come"
        for run in (turn.single,) if turn.single else turn.steps or [piece.run for piece in turn.pieces]:
            left[run].pop(0)
    assert not any(left.values())


def test_what_is_empty_counts_as_a_token() -> None:
    assert sizes_of(train("a", 0)) == [1]
