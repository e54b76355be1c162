"""What can go wrong in a cluster: pods and nodes that go, an API server that is away, and another autoscaler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from services.autoscaler.kubernetes.actuator import KubernetesActuator
from services.autoscaler.plan import Plan
from shared.errors import TemporaryError
from tests.k8s.acting import Acting, acting, drain, eventually, group, start
from tests.k8s.fake_cluster import NODES, PODS
from tests.k8s.fake_store import Refused

TWO = group("a", min=2, max=4)


@pytest.fixture
async def world() -> AsyncIterator[Acting]:
    async with acting() as found:
        await found.cluster.node("n0", gpus=2)
        await found.cluster.node("n1", gpus=2)
        await found.cluster.template("a")
        yield found


def running(world: Acting) -> dict[str, str]:
    """Nodes of pods that run."""
    pods = world.cluster.pods()
    return {name: one["spec"]["nodeName"] for name, one in pods.items() if one["status"]["phase"] == "Running"}


async def settled(world: Acting, actuator: KubernetesActuator, turns: int = 4) -> list[Plan]:
    return [await world.turn(actuator) for _ in range(turns)]


async def test_a_pod_that_is_deleted_by_hand_is_replaced(world: Acting) -> None:
    actuator = await world.actuator([TWO])
    await settled(world, actuator)
    assert len(running(world)) == 2
    await world.api.store.delete(PODS, "a-1", {})
    await world.cluster.steps()
    await settled(world, actuator)
    assert running(world).keys() == {"a-0", "a-1"}


async def test_a_pod_that_failed_is_taken_away_and_replaced(world: Acting) -> None:
    actuator = await world.actuator([TWO])
    await settled(world, actuator)
    await world.cluster.change(PODS, "a-0", status={"phase": "Failed", "reason": "Evicted", "message": "low on memory"})
    assert any("Evicted low on memory" in each for each in (await world.up_to_date(actuator)).problems)
    await settled(world, actuator)
    assert len(running(world)) == 2
    assert all(one["status"]["phase"] == "Running" for one in world.cluster.pods().values())


async def test_replicas_leave_a_cordoned_node_without_a_gap(world: Acting) -> None:
    actuator = await world.actuator([TWO])
    await settled(world, actuator)
    [node] = set(running(world).values())
    await world.cluster.change(NODES, node, spec={"unschedulable": True})
    for _ in range(6):
        await world.turn(actuator)
        assert len(running(world)) >= 2
    assert len(running(world)) == 2
    assert node not in running(world).values()


async def test_replicas_on_a_lost_node_are_replaced_elsewhere(world: Acting) -> None:
    actuator = await world.actuator([TWO])
    await settled(world, actuator)
    [node] = set(running(world).values())
    await world.cluster.lose(node)
    seen = await world.up_to_date(actuator)
    assert node not in {gpu.node for gpu in seen.gpus or ()}
    await settled(world, actuator)
    others = [name for name, where in running(world).items() if where != node]
    assert len(others) == 2
    # The lost node's kubelet cannot say that they have ended; when the node is back, they do.
    assert len(world.cluster.pods()) == 4
    await world.cluster.change(NODES, node, status={"conditions": [{"type": "Ready", "status": "True"}]})
    await settled(world, actuator)
    assert sorted(running(world)) == sorted(others)


async def test_a_node_that_is_away_for_seconds_loses_nothing(world: Acting) -> None:
    actuator = await world.actuator([group("a", min=4)])
    await settled(world, actuator)
    await world.cluster.lose("n0", since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    [plan] = await settled(world, actuator, 1)
    assert not plan.drains
    assert {gpu.node: gpu.cordoned for gpu in (await world.up_to_date(actuator)).gpus or ()} == {
        "n0": True,
        "n1": False,
    }


async def test_an_api_server_that_is_away_is_waited_for(world: Acting) -> None:
    actuator = await world.actuator([TWO])
    await settled(world, actuator)
    uids = {one["metadata"]["uid"] for one in world.cluster.pods().values()}
    world.api.go_down()

    async def nothing_known() -> bool | None:
        try:
            await actuator.look()
        except TemporaryError as error:
            return "nothing was heard of" in str(error) or None
        return None

    with pytest.raises(TemporaryError):
        await actuator.lead()
    await eventually(nothing_known, "old news are still acted upon")
    with pytest.raises(TemporaryError):
        await actuator.act([start(TWO, ["n1/0"], 2)], [])
    world.api.down = False
    await world.looked(actuator, lambda cluster: len(cluster.replicas) == 2)
    await eventually(lambda: leads(actuator), "it does not lead again")
    await settled(world, actuator)
    assert {one["metadata"]["uid"] for one in world.cluster.pods().values()} == uids


async def leads(actuator: KubernetesActuator) -> bool | None:
    try:
        return await actuator.lead() or None
    except TemporaryError:
        return None


async def test_an_act_that_is_broken_off_is_finished_by_the_next_plan(world: Acting) -> None:
    actuator = await world.actuator([TWO])
    creations = 0

    def down_after_one(verb: str, kind: object, name: str) -> Refused | None:
        nonlocal creations
        creations += (verb, kind) == ("create", PODS)
        return Refused(500, "InternalError", "etcdserver: leader changed") if creations > 1 else None

    world.api.refusing = down_after_one
    with pytest.raises(TemporaryError, match="leader changed"):
        await actuator.act([start(TWO, ["n0/0"]), start(TWO, ["n0/1"], 1)], [])
    world.api.refusing = lambda verb, kind, name: None
    await settled(world, actuator)
    assert running(world).keys() == {"a-0", "a-1"}


@pytest.mark.parametrize("trouble", ["failing", "silent", "down"])
async def test_an_api_server_that_fails_or_hangs_or_is_down_is_tried_again(
    world: Acting, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.autoscaler.kubernetes.api.TIMEOUT_SECONDS", 0.5)
    actuator = await world.actuator([TWO])
    setattr(world.api, trouble, True)
    with pytest.raises(TemporaryError, match="500|no answer in time|does not answer"):
        await actuator.act([start(TWO, ["n0/0"])], [])
    setattr(world.api, trouble, False)
    world.api.break_off()
    await eventually(lambda: leads(actuator), "it does not come back")
    await world.up_to_date(actuator)
    await actuator.act([start(TWO, ["n0/0"])], [])
    assert world.cluster.pods().keys() == {"a-0"}


async def test_throttling_is_obeyed(world: Acting) -> None:
    actuator = await world.actuator([TWO])
    world.api.throttled = 1
    with pytest.raises(TemporaryError, match="too many requests") as refused:
        await actuator.act([start(TWO, ["n0/0"])], [])
    assert refused.value.delay == 1.0
    asked = len(world.api.asked)
    for _ in range(5):
        with pytest.raises(TemporaryError, match="left alone"):
            await actuator.act([start(TWO, ["n0/0"])], [])
    assert len(world.api.asked) == asked
    world.api.throttled = None
    await eventually(lambda: leads(actuator), "it does not come back")
    await world.looked(actuator, lambda cluster: True)
    await actuator.act([start(TWO, ["n0/0"])], [])
    assert world.cluster.pods().keys() == {"a-0"}


async def test_a_watch_goes_on_where_it_was(world: Acting) -> None:
    actuator = await world.actuator([TWO])
    world.api.break_off()
    await world.cluster.node("n2", gpus=1)
    await world.looked(actuator, lambda cluster: len(cluster.gpus or ()) == 5)
    assert actuator._nodes.lists == 1


async def test_bookmarks_keep_a_quiet_watch_recent(world: Acting) -> None:
    """Nothing happens to nodes while pods come and go, until the versions of before are forgotten."""
    actuator = await world.actuator([TWO])
    before = int(actuator._nodes._version)
    await settled(world, actuator)

    async def moved() -> bool | None:
        return int(actuator._nodes._version) >= world.api.store.version > before or None

    await eventually(moved, "no bookmark came")
    world.api.store.forget()
    world.api.break_off()
    await world.cluster.node("n2", gpus=1)
    await world.looked(actuator, lambda cluster: len(cluster.gpus or ()) == 5)
    assert actuator._nodes.lists == 1


async def test_versions_that_are_gone_are_listed_anew(world: Acting) -> None:
    """What was deleted meanwhile, and what came, is not missed."""
    actuator = await world.actuator([TWO])
    await settled(world, actuator)
    world.api.go_down()
    await world.api.store.remove(PODS, "a-0")
    await world.cluster.node("n2", gpus=1)
    world.api.store.forget()
    world.api.down = False
    seen = await world.looked(actuator, lambda cluster: len(cluster.gpus or ()) == 5 and len(cluster.replicas) == 1)
    assert [each.name for each in seen.replicas] == ["a-1"]
    assert actuator._pods.lists == 2


async def test_long_lists_come_in_pages(world: Acting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.autoscaler.kubernetes.cache.PAGE", 3)
    for number in range(2, 9):
        await world.cluster.node(f"n{number}", gpus=1)
    actuator = await world.actuator([TWO])
    assert len({gpu.node for gpu in (await actuator.look()).gpus or ()}) == 9
    assert [verb for verb, kind, _ in world.api.asked if kind == NODES].count("list") == 3


async def test_one_of_two_leads_and_the_other_takes_over_when_it_is_gone(world: Acting) -> None:
    one = await world.actuator([TWO], "one", lease_seconds=3.0)
    two = await world.actuator([TWO], "two", lead=False, lease_seconds=3.0)
    assert not await two.lead()
    assert await one.lead()
    for _ in range(3):
        assert not await two.lead()
        assert await one.lead()
    # `one` sleeps from here on.
    await eventually(lambda: leads(two), "nobody takes over")
    with pytest.raises(TemporaryError, match="no longer holds the lease"):
        await one.act([start(TWO, ["n0/0"])], [])
    assert world.cluster.pods() == {}
    assert not await one.lead()
    spec = world.api.store.get(("coordination.k8s.io/v1", "leases"), "openrl-autoscaler")["spec"]
    assert spec["holderIdentity"].startswith("two_")
    assert spec["leaseTransitions"] == 1


async def test_a_leader_that_leaves_says_so(world: Acting) -> None:
    one = await world.actuator([TWO], "one")
    two = await world.actuator([TWO], "two", lead=False)
    assert not await two.lead()
    await one.close()
    assert await two.lead()


async def test_of_two_that_take_a_lease_at_once_one_gets_it(world: Acting) -> None:
    one = await world.actuator([TWO], "one")
    others = [await world.actuator([TWO], name, lead=False) for name in ("two", "three")]
    await one.close()
    results = await asyncio.gather(*(other.lead() for other in others))
    assert sorted(results) == [False, True]
    results = await asyncio.gather(*(other.lead() for other in others))
    assert sorted(results) == [False, True]


async def test_whoever_does_not_lead_does_not_act(world: Acting) -> None:
    await world.actuator([TWO], "one")
    two = await world.actuator([TWO], "two", lead=False)
    await world.looked(two, lambda cluster: True)
    with pytest.raises(TemporaryError, match="no longer holds"):
        await two.act([start(TWO, ["n0/0"])], [drain("a-0")])
    assert world.cluster.pods() == {}


async def test_a_new_leader_goes_on_where_the_last_one_stopped(world: Acting) -> None:
    """In the middle of a move: the successor is seen, and nothing is started besides."""
    one = await world.actuator([TWO], "one")
    await settled(world, one)
    [node] = set(running(world).values())
    await world.cluster.change(NODES, node, spec={"unschedulable": True})
    await world.turn(one)
    await one.close()
    two = await world.actuator([TWO], "two", lead=False)
    assert await two.lead()
    await settled(world, two, 6)
    assert len(running(world)) == 2
    assert node not in running(world).values()
