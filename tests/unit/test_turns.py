"""Whose messages a replica takes next."""

from __future__ import annotations

from collections import Counter

from shared import topology
from shared.turns import next_line


def test_a_line_alone_has_all_free_places() -> None:
    assert next_line({"a": 7}, {"a": 100}, 12) == ("a", 12)


def test_the_line_of_which_least_is_held_is_next_and_of_equals_the_one_that_waited_longest() -> None:
    assert next_line({"a": 1, "b": 5}, {"a": 3, "b": 1}, 1)[0] == "b"
    assert next_line({"a": 9, "b": 5, "c": 6}, {}, 1)[0] == "b"


def test_a_line_takes_no_more_than_its_share_while_others_wait() -> None:
    assert next_line({"a": 1, "b": 2}, {}, 512) == ("a", 256)
    assert next_line({"a": 1, "b": 2}, {"a": 500}, 12) == ("b", 12), "it catches up"
    assert next_line({"a": 1, "b": 2}, {"c": 500}, 12) == ("a", 6), "others hold those"


def test_endless_lines_are_given_the_same_however_many_places_are_free_each_time() -> None:
    waiting = dict.fromkeys("abcde", 0)
    held: Counter[str] = Counter()
    for turn in range(1, 600):
        line, count = next_line(waiting, held, 1 + turn % 3)
        waiting[line] = turn
        held[line] += count
        if turn % 2:
            busiest = max(held, key=lambda name: held[name])
            held[busiest] -= 1
    assert max(held.values()) - min(held.values()) <= 3


def test_lines_have_consumers_of_their_own_whatever_the_owners_are_called() -> None:
    pool = topology.sampler_consumer("a")
    names = set()
    for owner in ("b", "b==c", "x" * 200, "x" * 199 + "y", "ünï.*>", " "):
        line = f"{pool.subject}.{topology.token(owner)}"
        consumer = pool.line(line)
        assert (consumer.subject, consumer.lines, consumer.max_pending) == (line, "", pool.max_pending)
        assert len(consumer.name) <= topology.MAX_CONSUMER_NAME
        assert topology.sample_owner(line) == owner
        assert pool.noticed(line.replace(pool.subject, pool.notices)) == line
        names.add(consumer.name)
    assert len(names) == 6
    assert pool.line(pool.subject).name == pool.name, "requests without an owner keep the consumer that they had"
    assert topology.sample_owner(pool.subject) is None
    assert topology.sampler_consumer("a-b").name not in names
