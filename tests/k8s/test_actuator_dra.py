"""GPUs and shares of them by ResourceClaims."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.autoscaler.kubernetes.config import KubernetesConfig
from services.autoscaler.kubernetes.inventory import inventory
from shared.errors import TemporaryError
from tests.k8s.acting import Acting, acting, drain, group, start
from tests.k8s.fake_cluster import CLAIMS, PODS, SLICES
from tests.k8s.fake_store import Refused

SHARE = group("a", memory=24, milli=300)
WHOLE = group("b", memory=70)


@pytest.fixture
async def world() -> AsyncIterator[Acting]:
    async with acting() as found:
        await found.cluster.node("n0")
        await found.cluster.template("a")
        await found.cluster.template("b", resourceClaims=[{"name": "gpu", "resourceClaimTemplateName": "any"}])
        yield found


def claims(world: Acting) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in world.api.store.all(CLAIMS)}


def claim_of(world: Acting, pod: str) -> str:
    [entry] = world.cluster.pods()[pod]["spec"]["resourceClaims"]
    assert entry["name"] == "gpu"
    return str(entry["resourceClaimName"])


async def test_shares_are_claims_on_capacity_where_a_device_has_that(world: Acting) -> None:
    """Four of 300 milli: three are allocated, as on a real scheduler; the policy would not have started the fourth."""
    await world.cluster.devices("n0", 2, shared=True)
    actuator = await world.actuator([SHARE], mode="dra")
    await actuator.act([start(SHARE, ["n0/gpu-1"], number) for number in range(4)], [])
    await world.cluster.steps()
    seen = await world.up_to_date(actuator)
    assert sorted(each.state for each in seen.replicas) == ["ready", "ready", "ready", "starting"]
    assert {each.gpus for each in seen.replicas} == {("n0/gpu-1",)}
    claim = claims(world)[claim_of(world, "a-0")]
    exactly = claim["spec"]["devices"]["requests"][0]["exactly"]
    assert exactly["capacity"]["requests"] == {"memory": "24576Mi", "milli": "300"}
    assert exactly["deviceClassName"] == "openrl-gpu"
    assert [owner["kind"] for owner in claim["metadata"]["ownerReferences"]] == ["Pod"]
    assert claim["metadata"]["ownerReferences"][0]["uid"] == world.cluster.pods()["a-0"]["metadata"]["uid"]
    assert world.cluster.pods()["a-0"]["spec"]["containers"][0]["resources"]["claims"] == [{"name": "gpu"}]


async def test_a_claim_of_its_own_goes_with_its_pod_and_the_next_one_has_another(world: Acting) -> None:
    await world.cluster.devices("n0", 2, shared=True)
    actuator = await world.actuator([SHARE], mode="dra")
    await actuator.act([start(SHARE, ["n0/gpu-0"])], [])
    await world.cluster.steps()
    first = claim_of(world, "a-0")
    await world.up_to_date(actuator)
    await actuator.act([], [drain("a-0")])
    await world.cluster.steps()
    assert claims(world) == {}
    await world.up_to_date(actuator)
    await actuator.act([start(SHARE, ["n0/gpu-1"])], [])
    assert claim_of(world, "a-0") != first
    await world.cluster.steps()
    assert [each.gpus for each in (await world.up_to_date(actuator)).replicas] == [("n0/gpu-1",)]


async def test_shares_use_one_claim_where_a_device_is_allocated_once(world: Acting) -> None:
    await world.cluster.devices("n0", 1, shared=False)
    actuator = await world.actuator([SHARE, WHOLE], mode="dra")
    await actuator.act([start(SHARE, ["n0/gpu-0"], number) for number in range(3)], [])
    await world.cluster.steps()
    seen = await world.up_to_date(actuator)
    assert [each.state for each in seen.replicas] == ["ready"] * 3
    [claim] = claims(world).values()
    assert "capacity" not in claim["spec"]["devices"]["requests"][0]["exactly"]
    assert {claim_of(world, f"a-{number}") for number in range(3)} == {claim["metadata"]["name"]}
    assert {owner["name"] for owner in claim["metadata"]["ownerReferences"]} == {"a", "b"}
    # While one uses it, it stays; when none does, it is given back, and somebody may have the whole GPU.
    await actuator.act([], [drain("a-0"), drain("a-1")])
    await world.cluster.steps()
    await world.up_to_date(actuator)
    await actuator.act([], [])
    assert len(claims(world)) == 1
    await actuator.act([], [drain("a-2")])
    await world.cluster.steps()
    await world.up_to_date(actuator)
    await actuator.act([start(WHOLE, ["n0/gpu-0"])], [])
    await world.cluster.steps()
    [replica] = (await world.up_to_date(actuator)).replicas
    assert (replica.name, replica.state) == ("b-0", "ready")


async def test_several_gpus_are_one_claim_on_just_these(world: Acting) -> None:
    await world.cluster.devices("n0", 4, shared=False)
    two = group("b", memory=70, gpus=2)
    actuator = await world.actuator([two], mode="dra")
    await actuator.act([start(two, ["n0/gpu-1", "n0/gpu-3"])], [])
    await world.cluster.steps()
    [replica] = (await world.up_to_date(actuator)).replicas
    assert (replica.gpus, replica.state) == (("n0/gpu-1", "n0/gpu-3"), "ready")
    assert len(world.cluster.pods()["b-0"]["spec"]["resourceClaims"]) == 1


async def test_a_claim_that_could_not_be_made_is_made_next_time(world: Acting) -> None:
    """Between pod and claim the API server refuses: the pod waits, and is not started again."""
    await world.cluster.devices("n0", 1, shared=False)
    actuator = await world.actuator([WHOLE], mode="dra")
    quota = Refused(403, "Forbidden", "exceeded quota")
    world.api.refusing = lambda verb, kind, name: quota if (verb, kind) == ("create", CLAIMS) else None
    with pytest.raises(TemporaryError, match="claim for b-0"):
        await actuator.act([start(WHOLE, ["n0/gpu-0"])], [])
    world.api.refusing = lambda verb, kind, name: None
    await actuator.act([], [])
    await world.cluster.steps()
    assert [each.state for each in (await world.up_to_date(actuator)).replicas] == ["ready"]
    assert [verb for verb, kind, _ in world.api.asked if kind == PODS].count("create") == 1


async def test_a_claim_that_was_deleted_by_hand_is_made_again(world: Acting) -> None:
    await world.cluster.devices("n0", 1, shared=False)
    actuator = await world.actuator([SHARE], mode="dra")
    await actuator.act([start(SHARE, ["n0/gpu-0"])], [])
    await world.api.store.delete(CLAIMS, claim_of(world, "a-0"), {})
    await world.up_to_date(actuator)
    await actuator.act([], [])
    await world.cluster.steps()
    assert [each.state for each in (await world.up_to_date(actuator)).replicas] == ["ready"]


async def test_where_the_scheduler_put_a_replica_is_where_it_is(world: Acting) -> None:
    await world.cluster.devices("n0", 2, shared=False)
    actuator = await world.actuator([WHOLE], mode="dra")
    await actuator.act([start(WHOLE, ["n0/gpu-0"])], [])
    await world.cluster.steps()
    result = {"request": "gpu", "driver": "gpu.nvidia.com", "pool": "n0", "device": "gpu-1"}
    await world.cluster.change(
        CLAIMS, claim_of(world, "b-0"), status={"allocation": {"devices": {"results": [result]}}}
    )
    assert [each.gpus for each in (await world.up_to_date(actuator)).replicas] == [("n0/gpu-1",)]


async def test_replicas_on_gpus_that_the_driver_hides_are_not_lost_while_the_node_is_ready(world: Acting) -> None:
    await world.cluster.devices("n0", 2, shared=False)
    actuator = await world.actuator([WHOLE], mode="dra")
    await actuator.act([start(WHOLE, ["n0/gpu-1"])], [])
    await world.cluster.steps()
    held = world.api.store.get(SLICES, "n0-gpu.nvidia.com")
    await world.cluster.change(SLICES, "n0-gpu.nvidia.com", spec={"devices": held["spec"]["devices"][:1]})
    seen = await world.up_to_date(actuator)
    assert {gpu.name: gpu.cordoned for gpu in seen.gpus or ()} == {"n0/gpu-0": False, "n0/gpu-1": True}
    assert any("n0/gpu-1" in problem for problem in seen.problems)
    await world.api.store.remove(SLICES, "n0-gpu.nvidia.com")
    assert [gpu.name for gpu in (await world.up_to_date(actuator)).gpus or ()] == ["n0/gpu-1"]


def test_of_a_pool_the_newest_generation_counts_and_parts_of_gpus_do_not() -> None:
    def slice_(generation: int, *devices: dict[str, Any]) -> dict[str, Any]:
        pool = {"name": "n0", "generation": generation, "resourceSliceCount": 1}
        return {"spec": {"driver": "gpu.nvidia.com", "nodeName": "n0", "pool": pool, "devices": list(devices)}}

    def device(name: str, kind: str = "gpu") -> dict[str, Any]:
        return {"name": name, "attributes": {"type": {"string": kind}}, "capacity": {"memory": {"value": "40Gi"}}}

    ready = {"type": "Ready", "status": "True"}
    node = {"metadata": {"name": "n0"}, "spec": {}, "status": {"conditions": [ready]}}
    found = inventory(
        [node], [slice_(1, device("old")), slice_(2, device("new"), device("part", "mig"))], [], (),
        KubernetesConfig(mode="dra"), 0.0,
    )  # fmt: skip
    assert [gpu.name for gpu in found.gpus] == ["n0/new"]
