"""Plans of the autoscaler: what is started, moved and stopped."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.autoscaler.config import GroupConfig
from services.autoscaler.observed import Gpu, Load, Measured, Replica, State
from services.autoscaler.plan import Plan
from tests.unit.autoscaling import Cluster, check_room, gpus, group, load

SHAPES: list[dict[str, Any]] = [
    {"memory": 10, "milli": 100},
    {"memory": 20, "milli": 250},
    {"memory": 40, "milli": 300},
    {"memory": 30, "milli": 600},
    {"memory": 80, "milli": 1000},
    {"memory": 60, "gpus": 2},
    {"memory": 70, "gpus": 4},
    {"memory": 20, "milli": 200, "types": "A100"},
    {"memory": 30, "milli": 400, "types": "A100|H100"},
]


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """A cluster that has been through some changes of load, lost and cordoned nodes."""
    groups = [
        group(f"g{number}", min=draw(st.integers(0, 2)), max=draw(st.integers(2, 8)), priority=draw(st.integers(0, 2)),
              **draw(st.sampled_from(SHAPES)))
        for number in range(draw(st.integers(1, 4)))
    ]  # fmt: skip
    nodes = draw(
        st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from(["A100", "H100"])), min_size=1, max_size=4)
    )
    inventory = tuple(
        Gpu(f"n{node}/{index}", f"n{node}", 80, type_)
        for node, (many, type_) in enumerate(nodes)
        for index in range(many)
    )
    cluster = Cluster(groups, inventory)
    for _ in range(draw(st.integers(0, 3))):
        change(cluster, draw)
        for _ in range(3):
            plan = cluster.step(30.0)
            check_plan(cluster, plan)
    change(cluster, draw)
    return cluster


def change(cluster: Cluster, draw: st.DrawFn) -> None:
    for each in cluster.groups:
        cluster.loads[each.name] = load(draw(st.integers(0, 60)))
        if draw(st.integers(0, 9)) == 0:
            del cluster.loads[each.name]
    if draw(st.integers(0, 3)) == 0:
        node = draw(st.sampled_from(sorted({gpu.node for gpu in cluster.gpus})))
        cluster.gpus = tuple(dataclasses.replace(gpu, cordoned=gpu.node == node) for gpu in cluster.gpus)
    for number, replica in enumerate(cluster.replicas):
        state: State = draw(st.sampled_from(get_args(State)))
        pinned = draw(st.integers(0, 9)) == 0
        cluster.replicas[number] = dataclasses.replace(replica, state=state, pinned=pinned)


def check_plan(cluster: Cluster, plan: Plan) -> None:
    """What holds of every plan. Called after the plan was carried out."""
    check_room(cluster.gpus, [(each.shape, each.gpus) for each in cluster.replicas])


@settings(max_examples=100, deadline=None)
@given(clusters())
def test_every_plan_keeps_to_the_room_there_is(cluster: Cluster) -> None:
    cordoned = {gpu.name for gpu in cluster.gpus if gpu.cordoned}
    before = list(cluster.replicas)
    plan = cluster.plan()
    held = [(each.shape, each.gpus) for each in before] + [(each.shape, each.gpus) for each in plan.starts]
    check_room(cluster.gpus, held)  # what drains still has its share
    assert not any(cordoned & set(each.gpus) for each in plan.starts), "nothing new on cordoned GPUs"
    names = [each.replica for each in plan.starts]
    assert len(set(names) | {each.name for each in before}) == len(names) + len(before), "names are new"
    drained = {each.replica for each in plan.drains}
    assert len(drained) == len(plan.drains), "nothing is drained twice"
    untouchable = {each.name for each in before if each.pinned or each.state == "draining"}
    assert not drained & untouchable
    assert not untouchable & {each.replaces for each in plan.starts}


@settings(max_examples=100, deadline=None)
@given(clusters())
def test_bounds_are_kept_and_what_is_wanted_is_started_or_said_to_be_unmet(cluster: Cluster) -> None:
    plan = cluster.plan()
    for each in plan.groups:
        config = next(one for one in cluster.groups if one.name == each.group)
        assert config.min <= each.target.wanted <= config.max
        preempted = sum(one.group == each.group and one.cause == "preempted" for one in plan.drains)
        started = sum(one.group == each.group and not one.replaces for one in plan.starts)
        unmet = sum(one.group == each.group and not one.replaces for one in plan.unmet)
        assert started + unmet == max(0, each.target.wanted - each.have), "each one that is missing"
        assert preempted <= each.have
        assert each.reason


@settings(max_examples=100, deadline=None)
@given(clusters())
def test_the_same_observation_gives_the_same_plan(cluster: Cluster) -> None:
    memory = cluster.memory
    first = cluster.plan()
    cluster.memory = memory
    cluster.replicas = list(cluster.replicas)
    assert cluster.plan() == first


@settings(max_examples=100, deadline=None)
@given(clusters())
def test_a_plan_carried_out_leaves_nothing_to_do(cluster: Cluster) -> None:
    for _ in range(12):  # what waits for a drain, or for a successor, takes another plan
        plan = cluster.plan()
        calm = all(each.state == "ready" for each in cluster.replicas)
        cluster.replicas = [each for each in cluster.replicas if each.state != "draining"]
        cluster.replicas = [dataclasses.replace(each, state="ready") for each in cluster.replicas]
        if calm and not plan.changes:
            break
        cluster.carry_out(plan)
    again = cluster.plan()
    assert not again.changes, [again.starts, again.drains]


@settings(max_examples=100, deadline=None)
@given(clusters())
def test_without_metrics_nothing_is_given_up(cluster: Cluster) -> None:
    cluster.plan()
    wanted = {name: memory.wanted for name, memory in cluster.memory.groups.items()}
    cluster.loads = {}
    for _ in range(5):
        cluster.now += 3600
        plan = cluster.plan()
        assert {each.group: each.target.wanted for each in plan.groups} == wanted
        assert {each.target.why for each in plan.groups} == {"hold"}


def test_shares_fill_a_gpu_before_another_is_opened() -> None:
    cluster = Cluster([group("a", min=4, milli=250), group("b", min=2, milli=500, memory=40)], gpus(4))
    plan = cluster.step()
    assert len(plan.starts) == 6
    assert plan.gpus_used == 2


def test_gpus_without_any_memory_left_are_no_trouble() -> None:
    cluster = Cluster([group("a", min=2, memory=80, milli=300)], gpus(1))
    cluster.put("a", ["n0/0"])
    assert "no room" in cluster.plan().unmet[0].reason


def test_a_replica_on_several_gpus_gets_them_on_one_node() -> None:
    cluster = Cluster([group("wide", min=1, memory=70, gpus=4), group("small", min=1)], gpus(2, 4, 8))
    plan = cluster.step()
    wide = next(each for each in plan.starts if each.group == "wide")
    assert {name.split("/")[0] for name in wide.gpus} == {"n1"}, "the node that it fills"


def test_what_drains_holds_its_share_until_it_is_gone() -> None:
    cluster = Cluster([group("a", min=1, milli=1000, memory=80)], gpus(1))
    cluster.put("a", ["n0/0"], state="draining")
    plan = cluster.plan()
    assert not plan.starts
    assert plan.unmet[0].soon
    assert "a-1 waits until what is leaving n0/0 has gone" in plan.unmet[0].reason
    cluster.replicas = []
    assert [each.gpus for each in cluster.plan().starts] == [("n0/0",)]


def test_the_lower_priority_gives_way_the_last_come_first() -> None:
    low = group("low", min=0, milli=500, memory=40)
    high = group("high", min=1, milli=500, memory=40, priority=5)
    cluster = Cluster([low, high], gpus(1), loads={"low": load(running=14)})
    cluster.put("low", ["n0/0"], since=1.0)
    cluster.put("low", ["n0/0"], since=2.0)
    plan = cluster.plan()
    assert [(each.replica, each.cause) for each in plan.drains] == [("low-1", "preempted")]
    assert "low-1 (priority 0) makes room for high-0 (priority 5, the first" in plan.drains[0].reason
    assert [each.soon for each in plan.unmet] == [True]
    cluster.carry_out(plan, drained=False)
    plan = cluster.plan()
    assert not plan.drains, "one is enough"
    cluster.replicas = [each for each in cluster.replicas if each.state != "draining"]
    plan = cluster.plan()
    assert [each.group for each in plan.starts] == ["high"]
    assert "no room for a replica that needs 0.5 of a GPU with 40 GiB" in plan.unmet[0].reason


def test_a_group_without_any_replica_gets_one_from_a_group_that_has_several() -> None:
    loads = {"a": load(running=40), "b": load()}
    cluster = Cluster([group("a", milli=500), group("b", milli=500)], gpus(2), loads=loads)
    for gpu in ("n0/0", "n0/0", "n0/1", "n0/1"):
        cluster.put("a", [gpu])
    cluster.steps(10)
    assert cluster.count("a") == 4
    cluster.loads["b"] = load(50)
    cluster.steps(10)
    assert (cluster.count("a"), cluster.count("b")) == (3, 1)
    assert not any(plan.changes for plan in cluster.steps(60)), "and no more than one"


def test_at_equal_priority_groups_take_turns_when_room_is_short() -> None:
    cluster = Cluster([group("a", min=4, milli=500), group("b", min=4, milli=500)], gpus(2))
    cluster.step()
    assert (cluster.count("a"), cluster.count("b")) == (2, 2)


def test_others_move_when_that_makes_room_and_the_old_one_goes_when_the_new_one_is_ready() -> None:
    small, big = group("small", min=2, milli=400, memory=20), group("big", min=1, milli=1000, memory=80)
    cluster = Cluster([small, big], gpus(2), loads={"small": load()})
    cluster.put("small", ["n0/0"])
    cluster.put("small", ["n0/1"])
    plan = cluster.plan()
    assert [(each.group, each.replaces) for each in plan.starts] == [("small", "small-1")]
    assert "to make room for big-0" in plan.starts[0].reason
    assert not plan.drains
    cluster.carry_out(plan, state="starting")
    assert not cluster.plan().changes, "while it starts, everything waits"
    cluster.replicas = [dataclasses.replace(each, state="ready") for each in cluster.replicas]
    plan = cluster.plan()
    assert [(each.replica, each.cause) for each in plan.drains] == [("small-1", "moved")]
    cluster.carry_out(plan)
    plan = cluster.plan()
    assert [each.replica for each in plan.starts] == ["big-0"]


def test_a_lost_node_is_made_up_for_at_once() -> None:
    cluster = Cluster([group("a", min=3, milli=500, memory=40)], gpus(1, 1, 1))
    cluster.step()
    cluster.gpus = tuple(gpu for gpu in cluster.gpus if gpu.node != "n0")
    plan = cluster.step()
    assert {each.cause for each in plan.drains} == {"lost"}
    assert "n0/0, which is no longer there" in plan.drains[0].reason
    assert cluster.count("a") == 3


def test_a_cordoned_gpu_is_left_without_a_gap() -> None:
    cluster = Cluster([group("a", min=1)], gpus(1, 1))
    cluster.step()
    where = cluster.replicas[0].gpus[0]
    cluster.gpus = tuple(dataclasses.replace(gpu, cordoned=gpu.name == where) for gpu in cluster.gpus)
    plan = cluster.step()
    assert [each.replaces for each in plan.starts] == ["a-0"]
    assert [each.replica for each in cluster.step().drains] == ["a-0"]
    assert not cluster.step().changes


def test_pinned_replicas_stay_even_when_they_are_too_many() -> None:
    cluster = Cluster([group("a", max=1)], gpus(1, 1), loads={"a": load()})
    cluster.put("a", ["n0/0"], pinned=True)
    cluster.put("a", ["n1/0"], pinned=True)
    assert not any(plan.changes for plan in cluster.steps(3600, 60))


def test_replicas_of_a_group_that_is_not_configured_are_drained() -> None:
    cluster = Cluster([group("a"), group("old")], gpus(1))
    cluster.put("old", ["n0/0"])
    cluster.groups = [group("a")]
    assert [each.cause for each in cluster.plan().drains] == ["unknown"]


def test_when_gpus_cannot_be_listed_nothing_is_done() -> None:
    cluster = Cluster([group("a", min=1)], gpus(1), listable=False)
    plan = cluster.plan()
    assert "could not be listed" in plan.frozen
    assert not plan.changes


def test_a_gpu_is_freed_when_its_replicas_fit_elsewhere_and_all_is_calm() -> None:
    cluster = Cluster([group("a", min=2, milli=300)], gpus(1, 1), loads={"a": load()})
    cluster.put("a", ["n0/0"])
    cluster.put("a", ["n1/0"])
    plans = cluster.steps(298)
    assert not any(plan.changes for plan in plans), "first it has to be calm"
    plan = next(plan for plan in cluster.steps(60) if plan.changes)
    assert [each.replaces for each in plan.starts] == ["a-0"]
    assert "so that n0/0 is free, at 36 GPU seconds" in plan.starts[0].reason
    assert cluster.steps(10)[-1].gpus_used == 1


@pytest.mark.parametrize("change", [{"payback_seconds": 30.0}, {"most_moves": 0}])
def test_a_gpu_is_not_freed_when_that_does_not_pay(change: dict[str, float]) -> None:
    cluster = Cluster([group("a", min=2, milli=300)], gpus(1, 1), loads={"a": load()})
    cluster.scaling = type(cluster.scaling)(**change)  # type: ignore[arg-type]
    cluster.put("a", ["n0/0"])
    cluster.put("a", ["n1/0"])
    assert not any(plan.changes for plan in cluster.steps(900))


def test_trainers_scale_with_their_backlog() -> None:
    config = GroupConfig(
        name="t", role="trainer", base_model="m", shape=group().shape, tokens_per_second=1000, clear_seconds=100, max=9
    )
    cluster = Cluster([config], gpus(8))
    cluster.put("t", ["n0/0"])
    cluster.loads["t"] = Load(
        queued=Measured(0.0), backlog=Measured(350_000.0), duty=Measured(1.0), tokens=Measured(1000.0)
    )
    plan = cluster.plan()
    assert plan.groups[0].target.wanted == 7, "(1 busy + 350,000 / 100 s / 1,000 a second) / 0.7"
    assert "350000 tokens waiting" in plan.groups[0].reason


def test_overcommitted_gpus_get_nothing_new() -> None:
    cluster = Cluster([group("a", min=3, milli=600), group("b", min=1, milli=100)], gpus(1))
    cluster.put("a", ["n0/0"])
    cluster.put("a", ["n0/0"])
    plan = cluster.plan()
    assert not plan.starts
    assert {each.group for each in plan.unmet} == {"a", "b"}


def test_new_replicas_take_the_lowest_free_number_so_that_carrying_out_twice_starts_once() -> None:
    cluster = Cluster([group("a", min=3)], gpus(1))
    cluster.replicas.append(Replica("a-1", "a", "ready", ("n0/0",), cluster.groups[0].shape.shape()))
    assert [each.replica for each in cluster.plan().starts] == ["a-0", "a-2"]


def test_nobody_gets_the_name_of_a_replica_that_another_has_replaced() -> None:
    """It would be taken for the old one: drained, started again, and so on for ever."""
    cluster = Cluster([group(min=2)], gpus(1))
    shape = cluster.groups[0].shape.shape()
    cluster.replicas = [Replica("a-1", "a", "ready", ("n0/0",), shape, replaces="a-0")]
    cluster.loads["a"] = load()
    plan = cluster.plan()
    assert [start.replica for start in plan.starts] == ["a-2"]
    cluster.carry_out(plan)
    assert not cluster.plan().changes
