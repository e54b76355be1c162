"""What stands behind an API server, one step at a time: scheduler, kubelets, and the collector of what nobody owns."""

from __future__ import annotations

import copy
import re
from typing import Any

from tests.k8s.fake_api import FakeApi
from tests.k8s.fake_store import Kind, Object, now

PODS: Kind = ("v1", "pods")
NODES: Kind = ("v1", "nodes")
TEMPLATES: Kind = ("v1", "podtemplates")
CLAIMS: Kind = ("resource.k8s.io/v1", "resourceclaims")
SLICES: Kind = ("resource.k8s.io/v1", "resourceslices")
DRIVER = "gpu.nvidia.com"
NAMESPACE = "openrl"


class FakeCluster:
    """Moves pods on by one stage at each `step`: scheduled, running and ready; or, when deleted, gone."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api
        self.store = api.store

    async def node(self, name: str, gpus: int = 0, memory_mib: int = 81920, **labels: str) -> None:
        capacity = {"cpu": "64", "memory": "512Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        product = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.memory": str(memory_mib)}
        await self.store.create(
            NODES,
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "labels": {**(product if gpus else {}), **labels}},
                "spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
                "status": {"capacity": capacity, "allocatable": dict(capacity), "conditions": [_condition("Ready")]},
            },
            None,
        )

    async def change(self, kind: Kind, name: str, **parts: Any) -> None:
        """Merge into spec or status."""
        await self.store.put(kind, _deep(copy.deepcopy(self.store.get(kind, name)), parts))

    async def lose(self, node: str, since: str = "2026-01-01T00:00:00Z") -> None:
        unknown = _condition("Ready", "Unknown") | {"lastTransitionTime": since}
        await self.change(NODES, node, status={"conditions": [unknown]})

    async def template(self, name: str, **spec: Any) -> None:
        container = {"name": "service", "image": "openrl/mesh-cuda:0.1.0", "env": [{"name": "A", "value": "b"}]}
        toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        body = {"containers": [container], "tolerations": [toleration], "terminationGracePeriodSeconds": 20, **spec}
        await self.store.create(
            TEMPLATES,
            {
                "apiVersion": "v1",
                "kind": "PodTemplate",
                "metadata": {"name": name},
                "template": {"metadata": {"labels": {"app.kubernetes.io/name": name}}, "spec": body},
            },
            NAMESPACE,
        )

    async def devices(self, node: str, many: int, *, shared: bool) -> None:
        """What a DRA driver publishes for a node."""
        capacity = {"memory": {"value": "80Gi"}} | ({"milli": {"value": "1000"}} if shared else {})
        devices = [
            {
                "name": f"gpu-{index}",
                "attributes": {
                    "uuid": {"string": f"GPU-{node}-{index}"},
                    "type": {"string": "gpu"},
                    "productName": {"string": "NVIDIA H100 80GB HBM3"},
                },
                "capacity": capacity,
                **({"allowMultipleAllocations": True} if shared else {}),
            }
            for index in range(many)
        ]
        pool = {"name": node, "generation": 1, "resourceSliceCount": 1}
        await self.store.create(
            SLICES,
            {
                "apiVersion": SLICES[0],
                "kind": "ResourceSlice",
                "metadata": {"name": f"{node}-{DRIVER}"},
                "spec": {"driver": DRIVER, "nodeName": node, "pool": pool, "devices": devices},
            },
            None,
        )

    def pods(self) -> dict[str, Object]:
        return {one["metadata"]["name"]: one for one in self.store.all(PODS)}

    async def steps(self, many: int = 3) -> None:
        for _ in range(many):
            await self.step()

    async def step(self) -> None:
        for name, pod in self.pods().items():
            if pod["metadata"].get("deletionTimestamp"):
                await self._end(name, pod)
            elif not pod["spec"].get("nodeName"):
                await self._schedule(name, pod)
            elif pod["status"]["phase"] == "Pending" and self._is_ready(pod["spec"]["nodeName"]):
                ready = [_condition("PodScheduled"), _condition("Ready")]
                await self.change(PODS, name, status={"phase": "Running", "conditions": ready})
        await self._collect()

    async def _end(self, name: str, pod: Object) -> None:
        """A kubelet ends a pod within its grace; one that is away does not. Finalizers keep it."""
        node = pod["spec"].get("nodeName")
        if pod["metadata"].get("finalizers") or (node and not self._is_ready(node)):
            return
        await self.store.remove(PODS, name)

    async def _schedule(self, name: str, pod: Object) -> None:
        terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        node = terms["nodeSelectorTerms"][0]["matchFields"][0]["values"][0]
        why = self._why_not(pod, node)
        if why is None and not await self._allocate(pod, node):
            why = "cannot allocate all claims"
        if why is None:
            await self.change(PODS, name, spec={"nodeName": node}, status={"conditions": [_condition("PodScheduled")]})
        else:
            no = _condition("PodScheduled", "False") | {"reason": "Unschedulable", "message": why}
            await self.change(PODS, name, status={"conditions": [no]})

    def _why_not(self, pod: Object, node: str) -> str | None:
        found = self.store.objects.get((NODES, node))
        if found is None or not self._is_ready(node) or found["spec"].get("unschedulable"):
            return f"0/1 nodes are available: {node} is not there, or cordoned"
        here = [one for one in self.pods().values() if one["spec"].get("nodeName") == node]
        if sum(map(_gpus, here)) + _gpus(pod) > int(found["status"]["allocatable"].get("nvidia.com/gpu", 0)):
            return "0/1 nodes are available: 1 Insufficient nvidia.com/gpu"
        return None

    async def _allocate(self, pod: Object, node: str) -> bool:
        for one in pod["spec"].get("resourceClaims", ()):
            claim = self.store.objects.get((CLAIMS, one["resourceClaimName"]))
            if claim is None or claim["metadata"].get("deletionTimestamp"):
                return False
            user = {"resource": "pods", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
            status = copy.deepcopy(claim.get("status") or {})
            if "allocation" not in status:
                results = self._results(claim, node)
                if results is None:
                    return False
                status["allocation"] = {"devices": {"results": results}}
            status["reservedFor"] = [*status.get("reservedFor", []), user]
            await self.change(CLAIMS, claim["metadata"]["name"], status=status)
        return True

    def _results(self, claim: Object, node: str) -> list[Object] | None:
        """Devices that the claim's expression names and that have room; it must be one of the form that is written."""
        request = claim["spec"]["devices"]["requests"][0]
        exactly = request["exactly"]
        found = re.fullmatch(
            rf'device.driver == "{DRIVER}" && "uuid" in device.attributes\["{DRIVER}"\]'
            rf' && device.attributes\["{DRIVER}"\].uuid in \[(.*)\]',
            exactly["selectors"][0]["cel"]["expression"],
        )
        assert found is not None
        wanted = set(re.findall(r'"([^"]+)"', found[1]))
        results = []
        for one in self.store.all(SLICES):
            for device in one["spec"]["devices"]:
                named = device["attributes"]["uuid"]["string"] in wanted
                if named and one["spec"]["nodeName"] == node and self._has_room(node, device, exactly):
                    results.append({"request": "gpu", "driver": DRIVER, "pool": node, "device": device["name"]})
        return results if len(results) == exactly["count"] else None

    def _has_room(self, node: str, device: Object, exactly: Object) -> bool:
        used = 0
        for claim in self.store.all(CLAIMS):
            for one in ((claim.get("status") or {}).get("allocation") or {}).get("devices", {}).get("results", ()):
                if (one["pool"], one["device"]) == (node, device["name"]):
                    if not device.get("allowMultipleAllocations"):
                        return False
                    theirs = claim["spec"]["devices"]["requests"][0]["exactly"]
                    used += int(theirs["capacity"]["requests"]["milli"])
        if not device.get("allowMultipleAllocations"):
            return "capacity" not in exactly
        return used + int(exactly["capacity"]["requests"]["milli"]) <= 1000

    async def _collect(self) -> None:
        """Deletes what has owners of which none is there any more, and ends the use of claims by pods that are gone."""
        there = {one["metadata"]["uid"] for one in self.store.objects.values()}
        for (kind, name), one in list(self.store.objects.items()):
            owners = one["metadata"].get("ownerReferences") or []
            if owners and not any(owner["uid"] in there for owner in owners):
                await self.store.delete(kind, name, {})
        for claim in self.store.all(CLAIMS):
            users = (claim.get("status") or {}).get("reservedFor", [])
            left = [user for user in users if user["uid"] in there]
            if len(left) < len(users):
                changed = copy.deepcopy(claim)
                changed["status"]["reservedFor"] = left
                if not left:
                    del changed["status"]["allocation"]
                await self.store.put(CLAIMS, changed)

    def _is_ready(self, node: str) -> bool:
        found = self.store.objects.get((NODES, node))
        return found is not None and found["status"]["conditions"][0]["status"] == "True"


def _condition(kind: str, status: str = "True") -> Object:
    return {"type": kind, "status": status, "lastTransitionTime": now()}


def _gpus(pod: Object) -> int:
    return sum(int(one.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0)) for one in
               pod["spec"]["containers"])  # fmt: skip


def _deep(target: Object, parts: Object) -> Object:
    for key, value in parts.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _deep(target[key], value)
        else:
            target[key] = value
    return target
