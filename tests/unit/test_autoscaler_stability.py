"""Numbers of replicas: up at once, down with patience, held without metrics."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from services.autoscaler.config import AutoscalerConfig
from services.autoscaler.events import events
from services.autoscaler.observed import Load, Measured
from services.autoscaler.plan import Plan
from shared.config import load as load_config
from shared.contracts.placement import ScalingDecided
from shared.errors import UserError
from tests.unit.autoscaling import Cluster, gpus, group, load


def serving(replicas: int, running: float, **more: Any) -> Cluster:
    """A pool that has been running so for a while. A replica should have 7 of its 10 slots in use."""
    cluster = Cluster([group("a", milli=100, memory=4, **more)], gpus(8), loads={"a": load(running=running)})
    for _ in range(replicas):
        cluster.put("a", ["n0/0"])
    cluster.steps(120)
    return cluster


def wanted(plan: Plan) -> int:
    return plan.groups[0].target.wanted


def test_the_first_request_wakes_a_pool_at_zero_at_once() -> None:
    cluster = Cluster([group("a")], gpus(1), loads={"a": load()})
    assert not any(plan.starts for plan in cluster.steps(600))
    cluster.loads["a"] = load(1)
    plan = cluster.step()
    assert len(plan.starts) == 1
    assert "because the first request waits" in plan.groups[0].reason


def test_a_jump_is_answered_by_the_short_window_within_six_seconds() -> None:
    cluster = serving(2, running=14)
    cluster.loads["a"] = load(400, running=20)
    plans = cluster.steps(6)
    assert wanted(plans[-1]) > 4
    assert plans[-1].groups[0].target.why == "panic"
    assert "400 sequences waiting, 20 running (10 a replica)" in plans[-1].groups[0].reason


def test_a_small_rise_waits_for_the_long_window() -> None:
    cluster = serving(3, running=20)
    cluster.loads["a"] = load(running=25)
    assert wanted(cluster.steps(10)[-1]) == 3
    assert wanted(cluster.steps(60)[-1]) == 4


def test_replicas_that_start_are_not_ordered_again() -> None:
    cluster = serving(1, running=7)
    cluster.loads["a"] = load(30, running=10)
    cluster.now += 2
    first = cluster.plan()
    cluster.carry_out(first, state="starting")
    more = 0
    for _ in range(50):  # they take a minute and a half, in which the queue stays as it is
        cluster.now += 2
        plan = cluster.plan()
        cluster.carry_out(plan, state="starting")
        more += len(plan.starts)
    assert cluster.count("a") <= 6, "40 sequences at 7 a replica"


def test_it_goes_down_when_no_moment_of_the_last_minutes_wanted_more() -> None:
    cluster = serving(4, running=28)
    cluster.loads["a"] = load(running=7)
    assert {wanted(plan) for plan in cluster.steps(280)} == {4}
    assert wanted(cluster.steps(120)[-1]) == 2, "with a tenth of the target to spare"


def test_a_load_on_the_edge_does_not_make_it_flutter() -> None:
    cluster = serving(3, running=21)
    numbers = []
    for turn in range(900):
        cluster.loads["a"] = load(running=21 + (1 if turn // 45 % 2 else -1))
        numbers.append(wanted(cluster.step()))
    assert sum(one != other for one, other in pairwise(numbers)) <= 1


def test_zero_comes_after_the_idle_time_and_not_before() -> None:
    cluster = serving(2, running=14, idle_seconds=900)
    cluster.loads["a"] = load()
    assert {wanted(plan) for plan in cluster.steps(890)} == {2, 1}
    last = next(plan for plan in cluster.steps(20) if wanted(plan) == 0)
    assert "s without anything to do" in last.groups[0].reason


def test_a_minimum_is_kept_without_work() -> None:
    cluster = serving(2, running=14, min=1)
    cluster.loads["a"] = load()
    assert wanted(cluster.steps(3600)[-1]) == 1


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (None, "no metrics"),
        (Load(queued=Measured(0.0)), "the metric 'running' is missing"),
        (load(age=300.0), "the metric 'queued' is 300 s old"),
    ],
)
def test_without_metrics_the_number_is_held_for_ever(broken: Load | None, why: str) -> None:
    cluster = serving(3, running=20)
    cluster.loads = {"a": broken} if broken else {}
    plans = cluster.steps(7200, 60)
    assert {wanted(plan) for plan in plans} == {3}
    assert f"held at 3: {why}" in plans[-1].groups[0].reason


def test_patience_begins_anew_after_a_gap() -> None:
    cluster = serving(3, running=20)
    cluster.loads = {}
    cluster.steps(3600, 60)
    cluster.loads = {"a": load()}
    assert {wanted(plan) for plan in cluster.steps(290)} == {3}


def test_a_lost_replica_is_replaced_while_metrics_are_gone() -> None:
    cluster = serving(3, running=20)
    cluster.loads = {}
    cluster.step()
    cluster.replicas.pop()
    assert len(cluster.step().starts) == 1


def test_a_planner_that_begins_anew_changes_nothing_at_first() -> None:
    cluster = serving(3, running=14)
    cluster.memory = type(cluster.memory)()
    assert not any(plan.changes for plan in cluster.steps(200))


def test_a_full_cache_counts_like_full_slots() -> None:
    cluster = serving(2, running=10)
    full = dataclasses.replace(load(running=10), waiting=Measured(20.0), kv_cache=Measured(1.0))
    cluster.loads["a"] = full
    assert wanted(cluster.steps(10)[-1]) >= 6, "5 of 10 slots can be used: (10 + 20) / 5 / 0.7"


def test_a_queue_that_has_piled_up_does_not_order_replicas_that_come_too_late() -> None:
    rates = {"finished": Measured(2.0)}
    cluster = serving(2, running=14)
    cluster.loads["a"] = dataclasses.replace(load(600, running=20), **rates)
    assert wanted(cluster.steps(60)[-1]) < 20, "not the (600 + 20) / 7 that would be there when the queue is gone"


def test_events_say_what_changes_and_no_more() -> None:
    cluster = Cluster([group("a", max=2)], gpus(1), loads={"a": load(90)})
    first = cluster.step()
    said = events(first, None, cluster.observed(), 5.0, dry_run=False)
    assert [each.decision for each in said] == ["scale", "start", "start"]
    assert {(each.wanted, each.have, each.at) for each in said} == {(2, 0, 5.0)}
    assert said[1].gpus == ["n0/0"]
    second = cluster.step()
    assert events(second, first, cluster.observed(), 7.0, dry_run=False) == []
    cluster.loads = {}
    third = cluster.step()
    held: list[ScalingDecided] = events(third, second, cluster.observed(), 9.0, dry_run=True)
    assert [(each.decision, each.dry_run) for each in held] == [("hold", True)]


def test_configuration_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "autoscaler.toml"
    text = (
        '[[groups]]\nname = "a"\nrole = "sampler"\nbase_model = "m"\nshape = {memory_gib = 20, types = "A100|H100"}\n'
    )
    file.write_text(text)
    config = load_config(AutoscalerConfig, "autoscaler", file, {})
    assert config.groups[0].shape.shape().types == {"A100", "H100"}
    file.write_text(text + "min = 9\n")
    with pytest.raises(UserError, match=r"min 9 is more than max 8 .*groups"):
        load_config(AutoscalerConfig, "autoscaler", file, {})
    file.write_text(text.replace("20,", "20, gpus = 2, milli = 500,"))
    with pytest.raises(UserError, match="several are whole ones"):
        load_config(AutoscalerConfig, "autoscaler", file, {})
