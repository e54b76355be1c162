"""Whose request a sampler begins next."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import pytest

from services.sampler.engines.fair import FairQueue


@dataclass(eq=False)
class Item:
    owner: str
    cost: float = 1.0


def queue_of(items: list[Item]) -> FairQueue[Item]:
    queue = FairQueue[Item](owner=lambda item: item.owner, cost=lambda item: item.cost)
    for item in items:
        queue.add(item)
    return queue


def begin(queue: FairQueue[Item], count: int = 1) -> list[Item]:
    items = list(islice(queue.in_turn(), count))
    queue.take(items)
    return items


def test_one_owner_is_served_in_the_order_of_arrival() -> None:
    items = [Item("a", cost) for cost in (5, 1, 3)]
    assert list(queue_of(items).in_turn()) == items


def test_an_owner_with_one_request_does_not_wait_behind_a_thousand_of_another() -> None:
    queue = queue_of([Item("many") for _ in range(1000)])
    begin(queue, 10)
    single = Item("single")
    queue.add(single)
    assert single in begin(queue, 2)


def test_what_would_begin_is_what_begins_whether_together_or_one_by_one() -> None:
    rng = random.Random(0)
    items = [Item(rng.choice("abc"), rng.randint(1, 50)) for _ in range(60)]
    expected = list(queue_of(items).in_turn())
    together, one_by_one = queue_of(items), queue_of(items)
    assert begin(together, 60) == expected
    assert [begin(one_by_one)[0] for _ in range(60)] == expected
    assert len(together) == len(one_by_one) == 0


@pytest.mark.parametrize("seed", range(10))
def test_owners_that_always_wait_get_equal_shares_whatever_their_requests_cost(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {"small": (1, 3), "large": (40, 60), "mixed": (1, 60)}
    queue = queue_of([Item(owner, rng.randint(*sizes[owner])) for owner in sizes for _ in range(3000)])
    given: Counter[str] = Counter()
    while sum(given.values()) < 15_000:
        (item,) = begin(queue)
        given[item.owner] += int(item.cost)
    assert max(given.values()) - min(given.values()) <= 2 * 60


def test_turns_are_neither_saved_up_by_being_away_nor_debts_lost() -> None:
    queue = queue_of([Item("a") for _ in range(1000)])
    begin(queue, 500)
    for _ in range(200):
        queue.add(Item("b"))
    assert Counter(item.owner for item in begin(queue, 100)) == {"a": 50, "b": 50}
    queue = queue_of([Item("large", 100), *[Item("small") for _ in range(50)]])
    begin(queue, 2)
    queue.add(Item("large", 100))
    assert {item.owner for item in begin(queue, 40)} == {"small"}


def test_who_cancels_pays_nothing() -> None:
    cancelled = Item("a", 1000)
    queue = queue_of([cancelled, Item("b"), Item("a"), Item("b")])
    queue.remove(cancelled)
    queue.remove(cancelled)
    assert [item.owner for item in begin(queue, 3)] == ["b", "a", "b"]
