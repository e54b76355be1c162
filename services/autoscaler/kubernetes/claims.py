"""ResourceClaims (resource.k8s.io/v1): how a pod gets the GPU of the plan's choice, or a share of it. Pure.

Where a device may be allocated several times, each replica has a claim of its own on some of its capacity. Where it may
not, replicas with shares of it use one claim together, which is on the whole device. A whole GPU, or several, is always
a claim of its own. A replica's own claim belongs to its pod and goes with it; it is made after the pod, which waits for
it. A claim that is used together belongs to the pods' templates, and is deleted when nobody uses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from services.autoscaler.kubernetes.api import CLAIMS
from services.autoscaler.kubernetes.config import KubernetesConfig
from services.autoscaler.kubernetes.inventory import Device
from services.autoscaler.kubernetes.marks import GROUP, MANAGED_BY, MANAGER, SHARED, Object, Placed
from services.autoscaler.kubernetes.pods import CLAIM, owners
from services.autoscaler.kubernetes.replicas import Pod
from services.autoscaler.observed import WHOLE


def claim_name(replica: str, gpus: Sequence[str], milli: int, devices: Mapping[str, Device], once: str) -> str:
    """How a new replica's claim is called. `once` tells it from that of an earlier replica of the same name."""
    if is_shared(gpus, milli, devices):
        return f"shared-{_digest(gpus[0])}"
    return f"{replica[:200]}-{_digest(replica, once)}"


def is_shared(gpus: Sequence[str], milli: int, devices: Mapping[str, Device]) -> bool:
    """Whether replicas use one claim together."""
    return milli < WHOLE and not any(gpu in devices and devices[gpu].shared for gpu in gpus)


def claim(pod: Pod, devices: Mapping[str, Device], templates: Sequence[Object], config: KubernetesConfig) -> Object:
    """The claim that a pod waits for."""
    assert pod.placed is not None, "who calls has seen to it"
    shared = is_shared(pod.placed.gpus, pod.placed.milli, devices)
    of_pod = {**pod.found, "apiVersion": "v1", "kind": "Pod"}  # objects in lists do not say what they are
    labels = {MANAGED_BY: MANAGER} | ({SHARED: "true"} if shared else {GROUP: pod.group})
    return {
        "apiVersion": CLAIMS.group,
        "kind": CLAIMS.kind,
        "metadata": {
            "name": pod.placed.claim,
            "namespace": pod.found["metadata"]["namespace"],
            "labels": labels,
            "ownerReferences": owners(templates if shared else [of_pod]),
        },
        "spec": {"devices": {"requests": [_request(pod.placed, devices, config)]}},
    }


def _request(placed: Placed, devices: Mapping[str, Device], config: KubernetesConfig) -> Object:
    chosen = [devices[gpu] for gpu in placed.gpus if gpu in devices]
    exactly: Object = {
        "deviceClassName": config.device_class,
        "allocationMode": "ExactCount",
        "count": len(placed.gpus),
        "selectors": [{"cel": {"expression": expression(chosen, config)}}],
    }
    if chosen and all(device.shared for device in chosen):
        exactly["capacity"] = {"requests": _capacity(placed, chosen[0], config)}
    return {"name": CLAIM, "exactly": exactly}


def expression(devices: Sequence[Device], config: KubernetesConfig) -> str:
    """Names devices in CEL. Without an attribute that tells them apart, any of the driver's on the node will do."""
    driver = f"device.driver == {json.dumps(config.driver)}"
    identities = [device.identity for device in devices if device.identity is not None]
    if not identities or len(identities) < len(devices):
        return driver
    domain, _, name = config.device_attribute.rpartition("/")
    of_domain = f"device.attributes[{json.dumps(domain or config.driver)}]"
    # An attribute that a device does not have is an error, by which nothing at all would be allocated.
    return f"{driver} && {json.dumps(name)} in {of_domain} && {of_domain}.{name} in {json.dumps(identities)}"


def _capacity(placed: Placed, device: Device, config: KubernetesConfig) -> dict[str, str]:
    """What the driver counts of it: memory, and compute if it has that."""
    wanted = {
        config.memory_capacity: f"{-int(-placed.memory_gib * 1024 // 1)}Mi",
        config.compute_capacity: str(placed.milli),
    }
    short = {name.rpartition("/")[2] for name in device.capacities}
    return {name: amount for name, amount in wanted.items() if name.rpartition("/")[2] in short}


def unused(claims: Mapping[str, Object], pods: Sequence[Pod]) -> list[Object]:
    """Claims to be used together that no pod uses."""
    used = {pod.placed.claim for pod in pods if pod.placed is not None and not pod.ended}
    return [
        one
        for name, one in claims.items()
        if name not in used
        and (one["metadata"].get("labels") or {}).get(SHARED)
        and not one["metadata"].get("deletionTimestamp")
    ]


def missing(claims: Mapping[str, Object], pods: Sequence[Pod]) -> list[Pod]:
    """Pods that wait for a claim that is not there: one for each claim."""
    waiting = {
        pod.placed.claim: pod
        for pod in pods
        if pod.placed is not None and pod.placed.claim and not pod.ended and not pod.going
    }
    there = {name for name, one in claims.items() if not one["metadata"].get("deletionTimestamp")}
    return [pod for name, pod in waiting.items() if name not in there]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]
