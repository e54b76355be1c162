"""From a plan's start and a PodTemplate to a pod. Pure.

The template says everything but where: image, environment, volumes, probes. Added are name and marks, the node, and the
GPU, in the container `service` (or else the first).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import msgspec

from services.autoscaler.config import GroupConfig
from services.autoscaler.kubernetes.config import KubernetesConfig
from services.autoscaler.kubernetes.marks import GROUP, MANAGED_BY, MANAGER, PLACED, REASON, Object, Placed, name_of
from services.autoscaler.plan import Start

CLAIM = "gpu"
"""What a pod calls its claim. A template may have one of that name: ours takes its place."""
MARGIN_SECONDS = 15
"""Of the grace period, beyond the time to drain: for the last writes."""
DEFAULT_GRACE = 30


def pod(
    start: Start, placed: Placed, group: GroupConfig, template: Object, config: KubernetesConfig, drain_seconds: float
) -> Object:
    """The pod of a replica. The template owns it: when that is deleted, so is the pod."""
    made = copy.deepcopy(template.get("template") or {})
    metadata, spec = made.get("metadata") or {}, made.get("spec") or {}
    spec["terminationGracePeriodSeconds"] = grace(
        spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE), drain_seconds
    )
    _pin(spec, placed.node)
    container = _service(spec)
    _give_gpus(spec, container, placed, config)
    _tell(container, group)
    annotations = {PLACED: msgspec.json.encode(placed).decode(), REASON: start.reason}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": start.replica,
            "namespace": template["metadata"]["namespace"],
            "labels": {**(metadata.get("labels") or {}), MANAGED_BY: MANAGER, GROUP: group.name},
            "annotations": {**(metadata.get("annotations") or {}), **annotations},
            "ownerReferences": owners([template]),
        },
        "spec": spec,
    }


def owners(found: Sequence[Object]) -> list[Object]:
    """References to these, so that what refers to them goes when they have gone.

    Nothing waits for that (blockOwnerDeletion), which would take a permission on their finalizers.
    """
    return [
        {
            "apiVersion": one.get("apiVersion", "v1"),
            "kind": one.get("kind", "PodTemplate"),
            "name": name_of(one),
            "uid": one["metadata"]["uid"],
            "controller": False,
            "blockOwnerDeletion": False,
        }
        for one in found
    ]


def grace(asked: int, drain_seconds: float) -> int:
    """Seconds from SIGTERM to SIGKILL: what is asked for, and never less than draining takes."""
    return max(asked, math.ceil(drain_seconds) + MARGIN_SECONDS)


def _pin(spec: Object, node: str) -> None:
    """To a node, by its name, and still by the scheduler, which counts what is free there."""
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    terms = required.get("nodeSelectorTerms") or [{}]
    required["nodeSelectorTerms"] = [{**term, "matchFields": [field]} for term in terms]


def _service(spec: Object) -> Object:
    containers: list[Object] = spec["containers"]
    return next((one for one in containers if one["name"] == "service"), containers[0])


def _give_gpus(spec: Object, container: Object, placed: Placed, config: KubernetesConfig) -> None:
    resources = container.setdefault("resources", {})
    if config.mode == "dra":
        others = [one for one in spec.get("resourceClaims") or () if one["name"] != CLAIM]
        spec["resourceClaims"] = [*others, {"name": CLAIM, "resourceClaimName": placed.claim}]
        claims = [one for one in resources.get("claims") or () if one["name"] != CLAIM]
        resources["claims"] = [*claims, {"name": CLAIM}]
    elif config.mode != "cpu":
        many = 1 if config.mode == "time-slicing" else len(placed.gpus)
        for part in ("requests", "limits"):
            resources[part] = {**(resources.get(part) or {}), config.resource: str(many)}


def _tell(container: Object, group: GroupConfig) -> None:
    """Which model, and under which name it is known, if the template does not say so itself."""
    env: list[Object] = container.setdefault("env", [])
    there = {one["name"] for one in env}
    wanted: list[Object] = [
        {"name": f"OPENRL_{group.role.upper()}_BASE_MODEL", "value": group.base_model},
        {"name": "OPENRL_MESH_REPLICA", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]
    env.extend(one for one in wanted if one["name"] not in there)
