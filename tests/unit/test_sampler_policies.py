"""Policies that share too few places: who leaves, who waits, and what each request gets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, cast

import pytest
from prometheus_client import Histogram

from services.sampler.policies import Policies
from services.sampler.policy import TERM, Held, leaving
from shared.contracts.policies import PolicyRef
from shared.errors import PermanentError
from shared.tasks import Tasks

A, B, C, D = (PolicyRef(run=run, version=1) for run in "abcd")


# Who leaves


def test_the_least_recently_used_idle_policy_goes_first() -> None:
    held = {A: Held(used=1, until=0, users=1), B: Held(used=3, until=0), C: Held(used=2, until=0)}
    assert leaving(held, 1, now=9).now == (C,)
    assert leaving(held, 2, now=9).now == (C, B)


def test_where_all_are_in_use_the_one_whose_term_ended_first_takes_nothing_new() -> None:
    held = {A: Held(used=1, until=5, users=1), B: Held(used=9, until=4, users=1), C: Held(used=2, until=6, users=1)}
    plan = leaving(held, 1, now=9)
    assert plan.now == ()
    assert plan.closed == {B}


def test_nobody_leaves_before_its_term_and_one_asks_again_when_it_ends() -> None:
    held = {A: Held(used=1, until=12), B: Held(used=2, until=11, users=1)}
    plan = leaving(held, 1, now=9)
    assert (plan.now, plan.closed, plan.again) == ((), frozenset(), 11)


def test_nobody_leaves_if_nobody_wants_a_place() -> None:
    held = {A: Held(used=1, until=0), B: Held(used=2, until=0, users=1)}
    assert leaving(held, 0, now=9) == leaving(held, -3, now=9) == leaving({}, 0, now=9)
    assert leaving(held, 0, now=9).now == ()


@pytest.mark.parametrize("load_seconds", [0.1, 1.0, 20.0])
def test_loading_takes_a_bounded_part_of_the_time_where_two_tenants_ask_in_turn(load_seconds: float) -> None:
    """One place, two tenants with one request of 0.5 s at a time: the clock is the test's own."""
    now, loading, resident = 0.0, 0.0, A
    held = {A: Held(used=0, until=0)}
    served = {A: 0, B: 0}
    while now < 100 * load_seconds + 100:
        held[resident].users += 1
        now += 0.5
        held[resident].users -= 1
        held[resident].used = now
        served[resident] += 1
        if leaving(held, 1, now).now:  # the other one has waited since its last request
            now, loading, resident = now + load_seconds, loading + load_seconds, B if resident == A else A
            held = {resident: Held(used=now, until=now + TERM * load_seconds)}
    assert loading / now <= 0.2 + 0.02
    assert min(served.values()) > 0.7 * max(served.values())


# What requests get


class Engine:
    """Holds policies, and sees that no rule is broken."""

    base_model = "tiny"

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.policies: frozenset[PolicyRef] = frozenset()
        self.loads: list[PolicyRef] = []
        self.using: dict[PolicyRef, int] = {}

    async def load_policy(self, policy: PolicyRef, files: Mapping[str, bytes]) -> None:
        assert files["weights"] == str(policy).encode()
        assert policy not in self.policies
        assert len(self.policies) < self.capacity
        self.loads.append(policy)
        await asyncio.sleep(0)
        self.policies |= {policy}

    async def unload_policy(self, policy: PolicyRef) -> None:
        assert not self.using.get(policy)
        await asyncio.sleep(0)
        self.policies -= {policy}


class Place:
    """Policies over a fake engine and blob store."""

    def __init__(self, capacity: int, tasks: Tasks) -> None:
        self.engine = Engine(capacity)
        self.broken: dict[PolicyRef, Exception] = {}
        self.fetched: list[PolicyRef] = []
        self.until: asyncio.Event | None = None
        """Files come when this is set."""
        histogram = Histogram("seconds", "of loading", registry=None)
        self.policies = Policies(cast("Any", self.engine), self.fetch, tasks, histogram)

    async def fetch(self, policy: PolicyRef) -> Mapping[str, bytes]:
        self.fetched.append(policy)
        await asyncio.sleep(0)
        if self.until is not None:
            await self.until.wait()
        if policy in self.broken:
            raise self.broken[policy]
        return {"weights": str(policy).encode()}

    @contextlib.contextmanager
    def _used(self, policy: PolicyRef) -> Iterator[None]:
        using = self.engine.using
        using[policy] = using.get(policy, 0) + 1
        try:
            yield
        finally:
            using[policy] -= 1

    async def ask(self, policy: PolicyRef, turns: int = 3) -> PolicyRef:
        """A request that takes some turns of the loop."""
        async with self.policies.using(policy):
            with self._used(policy):
                for _ in range(turns):
                    assert policy in self.engine.policies
                    await asyncio.sleep(0)
        return policy

    def holding(self, policy: PolicyRef) -> tuple[asyncio.Event, asyncio.Task[None]]:
        """A request that goes on until its event is set."""
        end = asyncio.Event()

        async def hold() -> None:
            async with self.policies.using(policy):
                with self._used(policy):
                    await end.wait()

        return end, asyncio.create_task(hold())


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    """Without terms: the engine loads in no time, so that only the order of events counts."""
    found = Tasks("test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.sampler.policies.TERM", 0.0)
        yield found
    await found.stop()


async def settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_many_requests_for_a_new_policy_fetch_it_once(tasks: Tasks) -> None:
    place = Place(2, tasks)
    await asyncio.gather(*(place.ask(A) for _ in range(20)))
    assert place.fetched == place.engine.loads == [A]


async def test_all_that_waits_for_a_policy_is_served_in_one_turn(tasks: Tasks) -> None:
    place = Place(1, tasks)
    end, holding = place.holding(A)
    await settled()
    waiting = [asyncio.create_task(place.ask(B))]
    await settled()
    waiting += [asyncio.create_task(place.ask(policy)) for _ in range(10) for policy in (A, C, B)]
    await settled()
    assert place.engine.using[A] == 1
    end.set()
    await asyncio.gather(holding, *waiting)
    assert place.engine.loads == [A, B, C, A], "A took nothing new once others waited, and then had its next turn"


@pytest.mark.parametrize("capacity", [1, 2, 3])
async def test_nobody_starves_however_much_others_ask(tasks: Tasks, capacity: int) -> None:
    place = Place(capacity, tasks)
    busy = True

    async def traffic(policy: PolicyRef) -> None:
        while busy:
            await place.ask(policy)

    greedy = [asyncio.create_task(traffic(policy)) for policy in (A, B, C) for _ in range(8)]
    await settled()
    for _ in range(5):
        async with asyncio.timeout(10):
            assert await place.ask(D) == D
    busy = False
    await asyncio.gather(*greedy)


async def test_two_tenants_in_one_place_take_turns_with_all_that_each_has(tasks: Tasks) -> None:
    place = Place(1, tasks)
    rounds = 20

    async def tenant(policy: PolicyRef) -> None:
        for _ in range(rounds):
            await asyncio.gather(*(place.ask(policy, turns=1 + number % 3) for number in range(16)))

    await asyncio.gather(tenant(A), tenant(B))
    assert len(place.engine.loads) <= 2 * rounds + 2, "never more than one turn for 16 requests"


async def test_an_evicted_policy_comes_back_by_itself(tasks: Tasks) -> None:
    place = Place(2, tasks)
    for policy in (A, B, C, A):
        assert await place.ask(policy) == policy
    assert place.engine.loads == [A, B, C, A]
    await place.ask(C)
    assert place.engine.loads == [A, B, C, A], "it was B that left, the least recently used"


async def test_what_runs_keeps_its_policy_when_newer_ones_come(tasks: Tasks) -> None:
    place = Place(2, tasks)
    end, holding = place.holding(A)
    await settled()
    for policy in (B, C, D):
        await place.policies.prefetch(policy)
    assert A in place.engine.policies
    end.set()
    await holding
    assert place.engine.loads == [A, B, C, D]


async def test_an_announced_policy_waits_for_nobody_and_closes_nothing(tasks: Tasks) -> None:
    place = Place(1, tasks)
    end, holding = place.holding(A)
    await settled()
    await place.policies.prefetch(B)
    assert place.engine.loads == [A]
    assert await place.ask(A) == A
    end.set()
    await holding


async def test_a_broken_policy_is_an_error_takes_no_place_and_can_be_mended(tasks: Tasks) -> None:
    place = Place(1, tasks)
    await place.ask(A)
    place.broken[B] = PermanentError("checksum differs")
    outcomes = await asyncio.gather(*(place.ask(B) for _ in range(3)), place.ask(A), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["checksum differs"] * 3 + ["a@1"]
    assert place.engine.loads == [A]
    place.broken.clear()
    assert await place.ask(B) == B


async def test_an_announced_policy_has_its_place_free_when_its_files_come(tasks: Tasks) -> None:
    place = Place(1, tasks)
    await place.ask(A)
    files = asyncio.Event()
    place.until = files
    coming = asyncio.create_task(place.policies.prefetch(B))
    await settled()
    assert place.engine.policies == frozenset(), "nobody used A"
    files.set()
    await coming
    assert place.engine.policies == {B}


async def test_an_announced_policy_that_is_broken_or_given_up_gives_its_place_back(tasks: Tasks) -> None:
    place = Place(1, tasks)
    await place.ask(A)
    place.broken[B] = PermanentError("checksum differs")
    with pytest.raises(PermanentError, match="checksum differs"):
        await place.policies.prefetch(B)
    for moment in range(20):
        coming = asyncio.create_task(place.policies.prefetch(C))
        for _ in range(moment):
            await asyncio.sleep(0)
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        async with asyncio.timeout(10):
            assert set(await asyncio.gather(place.ask(A), place.ask(D))) == {A, D}


async def test_requests_that_are_cancelled_while_they_wait_leave_no_trace(tasks: Tasks) -> None:
    place = Place(1, tasks)
    end, holding = place.holding(A)
    await settled()
    waiting = [asyncio.create_task(place.ask(policy)) for policy in (B, B, C)]
    await settled()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await settled()
    assert await place.ask(A) == A, "nobody wants its place any more"
    end.set()
    await holding
    assert place.engine.loads == [A]
    assert await place.ask(B) == B


async def test_cancelling_at_any_moment_breaks_no_rule(tasks: Tasks) -> None:
    for moment in range(40):
        place = Place(1, tasks)
        others = [asyncio.create_task(place.ask(policy)) for policy in (A, B, A, C)]
        victims = [asyncio.create_task(place.ask(policy)) for policy in (B, D)]
        for _ in range(moment):
            await asyncio.sleep(0)
        for task in victims:
            task.cancel()
        async with asyncio.timeout(10):
            assert await asyncio.gather(*others) == [A, B, A, C]
            await asyncio.gather(*victims, return_exceptions=True)
            assert await place.ask(D) == D
