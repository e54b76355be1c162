"""What the Kubernetes actuator makes of plans, and sees of a cluster."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.autoscaler.kubernetes.actuator import KubernetesActuator
from services.autoscaler.kubernetes.config import KubernetesConfig
from shared.errors import TemporaryError, UserError
from shared.tasks import Tasks
from tests.k8s.acting import Acting, acting, drain, group, start
from tests.k8s.fake_cluster import CLAIMS, NODES, PODS, TEMPLATES
from tests.k8s.fake_store import Refused

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "autoscaler.md"
A, B = group("a"), group("b")


@pytest.fixture
async def world() -> AsyncIterator[Acting]:
    async with acting() as found:
        await found.cluster.node("n0", gpus=4)
        await found.cluster.node("n1", gpus=4)
        await found.cluster.template("a")
        await found.cluster.template("b")
        yield found


def env_of(pod: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value") or one["valueFrom"] for one in pod["spec"]["containers"][0]["env"]}


async def test_a_start_becomes_a_pod_of_the_template_on_the_gpus_node(world: Acting) -> None:
    two = group("a", gpus=2)
    actuator = await world.actuator([two])
    await actuator.act([start(two, ["n1/0", "n1/1"], replaces="a-7")], [])
    pod = world.cluster.pods()["a-0"]
    template = world.api.store.get(TEMPLATES, "a")
    assert pod["metadata"]["labels"]["openrl.dev/group"] == "a"
    assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "a"
    assert [owner["uid"] for owner in pod["metadata"]["ownerReferences"]] == [template["metadata"]["uid"]]
    container = pod["spec"]["containers"][0]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"nvidia.com/gpu": "2"}
    assert env_of(pod) == {
        "A": "b",
        "OPENRL_SAMPLER_BASE_MODEL": "org/model",
        "OPENRL_MESH_REPLICA": {"fieldRef": {"fieldPath": "metadata.name"}},
    }
    terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms["nodeSelectorTerms"] == [
        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}
    ]
    assert pod["metadata"]["annotations"]["openrl.dev/reason"] == "because"
    [replica] = (await world.up_to_date(actuator)).replicas
    assert (replica.gpus, replica.state, replica.replaces) == (("n1/0", "n1/1"), "starting", "a-7")
    assert replica.shape == two.shape.shape()


async def test_a_template_keeps_its_affinity_environment_and_longer_grace(world: Acting) -> None:
    zone = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["z"]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [zone]}}
    await world.cluster.template(
        "own",
        affinity={"nodeAffinity": required},
        terminationGracePeriodSeconds=180,
        containers=[
            {"name": "sidecar", "image": "x"},
            {"name": "service", "image": "y", "env": [{"name": "OPENRL_SAMPLER_BASE_MODEL", "value": "mine"}]},
        ],
    )
    special = group("a", pod_template="own")
    actuator = await world.actuator([special])
    await actuator.act([start(special, ["n0/0"])], [])
    spec = world.cluster.pods()["a-0"]["spec"]
    terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert terms[0].keys() == {"matchExpressions", "matchFields"}
    assert spec["terminationGracePeriodSeconds"] == 180
    assert "resources" not in spec["containers"][0]
    assert spec["containers"][1]["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert spec["containers"][1]["env"][0]["value"] == "mine"


async def test_the_inventory_has_gpus_of_our_nodes_with_type_memory_and_cordon(world: Acting) -> None:
    await world.cluster.node("other", gpus=8, pool="theirs")
    await world.cluster.node("cpu-only")
    await world.cluster.change(NODES, "n1", spec={"unschedulable": True}, metadata={"labels": {"mesh": "yes"}})
    await world.cluster.change(NODES, "n0", metadata={"labels": {"mesh": "yes"}})
    actuator = await world.actuator([group("a", types="H100|A100")], node_selector={"mesh": "yes"})
    seen = await world.looked(actuator, lambda cluster: cluster.gpus is not None)
    assert seen.gpus is not None
    assert [gpu.name for gpu in seen.gpus] == [f"n{node}/{index}" for node in (0, 1) for index in range(4)]
    assert {(gpu.type, gpu.memory_gib) for gpu in seen.gpus} == {("H100", 80.0)}
    assert [gpu.cordoned for gpu in seen.gpus] == [False] * 4 + [True] * 4


async def test_gpus_whose_memory_nobody_says_are_a_problem_until_it_is_configured(world: Acting) -> None:
    labels = {"nvidia.com/gpu.product": None, "nvidia.com/gpu.memory": None, "cloud.google.com/gke-accelerator": "x-80"}
    await world.api.store.patch(NODES, "n0", {"metadata": {"labels": labels}})
    actuator = await world.actuator([A])
    seen = await actuator.look()
    assert [gpu.node for gpu in seen.gpus or ()] == ["n1"] * 4
    assert any("memory_gib.'x-80'" in problem for problem in seen.problems)
    told = await world.actuator([A], "two", lead=False, memory_gib={"x-80": 79.5})
    seen = await world.looked(told, lambda cluster: len(cluster.gpus or ()) == 8)
    assert [gpu.memory_gib for gpu in seen.gpus or ()][:4] == [79.5] * 4


async def test_a_pod_is_starting_then_ready_then_draining(world: Acting) -> None:
    actuator = await world.actuator([A])
    await actuator.act([start(A, ["n0/0"])], [])
    assert [each.state for each in (await world.up_to_date(actuator)).replicas] == ["starting"]
    await world.cluster.steps()
    assert [each.state for each in (await world.up_to_date(actuator)).replicas] == ["ready"]
    await actuator.act([], [drain("a-0")])
    assert [each.state for each in (await actuator.look()).replicas] == ["draining"]
    await world.cluster.step()
    assert (await world.up_to_date(actuator)).replicas == ()


async def test_draining_has_more_time_than_it_takes(world: Acting) -> None:
    actuator = await world.actuator([A], drain=100.0)
    await actuator.act([start(A, ["n0/0"])], [])
    await world.cluster.steps()
    await actuator.act([], [drain("a-0")])
    metadata = world.cluster.pods()["a-0"]["metadata"]
    assert metadata["deletionGracePeriodSeconds"] > 100
    await actuator.act([], [drain("a-0")])
    assert [verb for verb, kind, _ in world.api.asked if kind == PODS].count("delete") == 1


async def test_a_pod_of_the_same_name_that_came_later_is_not_deleted(world: Acting) -> None:
    actuator = await world.actuator([A])
    await actuator.act([start(A, ["n0/0"])], [])
    swapped: list[str] = []

    def swap(verb: str, kind: Any, name: str) -> None:
        """Just before the deletion arrives, somebody deletes the pod and makes another one."""
        if verb == "delete" and not swapped:
            swapped.append(name)
            held = world.api.store.objects[PODS, "a-0"]
            held["metadata"]["uid"] = "another"

    world.api.refusing = swap
    await actuator.act([], [drain("a-0")])
    assert swapped
    assert world.cluster.pods()["a-0"]["metadata"]["uid"] == "another"
    assert "deletionTimestamp" not in world.cluster.pods()["a-0"]["metadata"]


async def test_the_same_plan_twice_and_by_two_starts_nothing_twice(world: Acting) -> None:
    first = await world.actuator([A])
    plan = [start(A, ["n0/0"]), start(A, ["n0/1"], 1)]
    await first.act(plan, [])
    uids = {name: pod["metadata"]["uid"] for name, pod in world.cluster.pods().items()}
    await first.act(plan, [])
    await first.close()
    second = await world.actuator([A], "two")
    await second.act(plan, [])
    assert {name: pod["metadata"]["uid"] for name, pod in world.cluster.pods().items()} == uids
    assert uids.keys() == {"a-0", "a-1"}


async def test_what_was_started_is_seen_at_once(world: Acting) -> None:
    """Whatever the watch does: a plan that missed it would use its GPU once more."""
    actuator = await world.actuator([A])
    actuator._pods._apply = lambda event: None  # type: ignore[method-assign]
    await actuator.act([start(A, ["n0/0"])], [])
    assert [each.name for each in (await actuator.look()).replicas] == ["a-0"]


async def test_deleting_the_template_deletes_its_pods(world: Acting) -> None:
    actuator = await world.actuator([A, B])
    await actuator.act([start(A, ["n0/0"]), start(B, ["n0/1"])], [])
    await world.cluster.steps()
    await world.api.store.delete(TEMPLATES, "a", {})
    await world.cluster.steps()
    assert world.cluster.pods().keys() == {"b-0"}


async def test_without_its_template_a_group_is_a_problem_and_others_go_on(world: Acting) -> None:
    lost = group("lost")
    actuator = await world.actuator([lost, A])
    assert any("no PodTemplate lost" in problem for problem in (await actuator.look()).problems)
    with pytest.raises(TemporaryError, match="start lost-0: there is no PodTemplate lost"):
        await actuator.act([start(lost, ["n0/0"]), start(A, ["n0/1"])], [])
    assert world.cluster.pods().keys() == {"a-0"}


async def test_what_the_api_server_refuses_does_not_keep_the_rest(world: Acting) -> None:
    quota = Refused(403, "Forbidden", "exceeded quota: gpus")
    world.api.refusing = lambda verb, kind, name: quota if (verb, kind) == ("create", PODS) else None
    actuator = await world.actuator([A])
    with pytest.raises(TemporaryError, match="2 changes were refused.*exceeded quota"):
        await actuator.act([start(A, ["n0/0"]), start(A, ["n0/1"], 1)], [])
    world.api.refusing = lambda verb, kind, name: None
    await actuator.act([start(A, ["n0/0"])], [])
    assert world.cluster.pods().keys() == {"a-0"}


async def test_why_a_pod_does_not_get_on_is_said(world: Acting) -> None:
    actuator = await world.actuator([A])
    await world.cluster.change(NODES, "n0", status={"allocatable": {"nvidia.com/gpu": "0"}})
    await actuator.act([start(A, ["n0/0"]), start(A, ["n1/0"], 1)], [])
    await world.cluster.steps()
    crash = {"name": "service", "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}}
    await world.cluster.change(PODS, "a-1", status={"containerStatuses": [crash]})
    seen = await world.up_to_date(actuator)
    assert [each for each in seen.problems if "a-0" in each and "Insufficient nvidia.com/gpu" in each]
    assert [each for each in seen.problems if "a-1" in each and "CrashLoopBackOff" in each]
    assert {each.state for each in seen.replicas if each.name == "a-0"} == {"starting"}


async def test_a_pod_whose_marks_were_destroyed_keeps_its_name_and_is_said(world: Acting) -> None:
    actuator = await world.actuator([A])
    await actuator.act([start(A, ["n0/0"])], [])
    await world.api.store.patch(PODS, "a-0", {"metadata": {"annotations": {"openrl.dev/placed": "?"}}})
    seen = await world.up_to_date(actuator)
    assert [(each.name, each.state, each.gpus) for each in seen.replicas] == [("a-0", "draining", ())]
    assert any("cannot be read" in each for each in seen.problems)


async def test_people_can_pin_a_replica(world: Acting) -> None:
    actuator = await world.actuator([A])
    await actuator.act([start(A, ["n0/0"])], [])
    await world.api.store.patch(PODS, "a-0", {"metadata": {"annotations": {"openrl.dev/pinned": "true"}}})
    assert [each.pinned for each in (await world.up_to_date(actuator)).replicas] == [True]


async def test_time_slices_are_slots_of_a_gpu(world: Acting) -> None:
    await world.cluster.change(
        NODES, "n0", status={"capacity": {"nvidia.com/gpu": "8"}, "allocatable": {"nvidia.com/gpu": "8"}}
    )
    half = group("a", memory=40, milli=500)
    actuator = await world.actuator([half], mode="time-slicing", slices=4)
    seen = await world.looked(actuator, lambda cluster: len(cluster.gpus or ()) == 3)
    assert [gpu.name for gpu in seen.gpus or ()] == ["n0/0", "n0/1", "n1/0"]
    await actuator.act([start(half, ["n0/0"]), start(half, ["n0/0"], 1)], [])
    limits = [pod["spec"]["containers"][0]["resources"]["limits"] for pod in world.cluster.pods().values()]
    assert limits == [{"nvidia.com/gpu": "1"}] * 2


async def test_without_gpus_a_node_is_its_memory(world: Acting) -> None:
    small = group("a", memory=4, milli=250)
    actuator = await world.actuator([small], mode="cpu")
    seen = await actuator.look()
    assert [(gpu.name, gpu.type, gpu.memory_gib) for gpu in seen.gpus or ()] == [
        ("n0/cpu", "cpu", 512.0),
        ("n1/cpu", "cpu", 512.0),
    ]
    await actuator.act([start(small, ["n0/cpu"])], [])
    assert "nvidia.com/gpu" not in json.dumps(world.cluster.pods()["a-0"]["spec"]["containers"])


@pytest.mark.parametrize(
    ("asked", "mode", "says"),
    [
        (group("a", milli=500), "device-plugin", "whole GPUs"),
        (group("a", milli=200), "time-slicing", "250 or more"),
        (group("a", gpus=2), "time-slicing", "2 GPUs"),
        (group("a_b"), "dra", "letters, digits and '-'"),
    ],
)
def test_what_a_mode_cannot_give_is_said_at_the_start(asked: Any, mode: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        KubernetesActuator(KubernetesConfig(mode=mode, slices=4), [asked], "one", 8.0, Tasks("test"))


async def test_permissions_are_those_that_the_documentation_names(world: Acting) -> None:
    """The table is what a Role has to allow: nothing else is asked for, and nothing of it in vain."""
    await world.cluster.devices("n0", 4, shared=False)
    half = group("a", memory=30, milli=500)
    actuator = await world.actuator([half], mode="dra")
    await world.turn(actuator, None)
    await actuator.act([start(half, ["n0/gpu-0"])], [])
    await world.cluster.steps()
    await world.up_to_date(actuator)
    await actuator.act([], [drain("a-0")])
    await world.cluster.steps()
    await world.up_to_date(actuator)
    await actuator.act([], [])
    await actuator.lead()
    assert world.api.store.all(CLAIMS) == []
    table = DOCUMENTATION.read_text().partition("**What it may do**")[2].partition("## Limits")[0]
    documented = {row[1]: set(row[2].split(", ")) for row in re.finditer(r"^\| ([a-z]+) \| ([a-z, ]+) \|", table, re.M)}
    del documented["resource"]
    assert world.api.verbs() == documented
