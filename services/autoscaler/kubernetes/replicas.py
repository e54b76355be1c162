"""From pods to replicas, and what is wrong with them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from services.autoscaler.kubernetes.inventory import Device
from services.autoscaler.kubernetes.marks import (
    GROUP,
    PINNED,
    PLACED,
    Object,
    Placed,
    annotations_of,
    condition,
    labels_of,
    name_of,
    seconds,
)
from services.autoscaler.observed import Replica, Shape, State

HOPELESS = {"CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "CreateContainerConfigError", "InvalidImageName",
            "CreateContainerError", "RunContainerError"}  # fmt: skip
"""Why a container waits, where waiting alone will not help."""


@dataclass(frozen=True)
class Pod:
    """A pod of ours."""

    name: str
    uid: str
    group: str
    found: Object
    placed: Placed | None
    """None: people have changed what it says."""

    @property
    def ended(self) -> bool:
        """Whether it will never run again, so that it can be taken away."""
        return (self.found.get("status") or {}).get("phase") in ("Failed", "Succeeded")

    @property
    def going(self) -> bool:
        """Whether it has been told to end."""
        return bool(self.found["metadata"].get("deletionTimestamp"))

    @property
    def grace(self) -> int:
        """Seconds that it may take to end."""
        return int(self.found["spec"].get("terminationGracePeriodSeconds") or 30)

    @property
    def state(self) -> State:
        """As the policy takes it."""
        if self.ended or self.going or self.placed is None:
            return "draining"
        return "ready" if condition(self.found, "Ready").get("status") == "True" else "starting"

    def replica(self, gpus: tuple[str, ...]) -> Replica:
        """As the policy takes it. What has ended keeps its name until it is gone, and no GPU."""
        since, pinned = seconds(self.found["metadata"].get("creationTimestamp")), False
        if self.placed is None or self.ended:
            return Replica(self.name, self.group, "draining", (), Shape(0.0, 0), since)
        pinned = annotations_of(self.found).get(PINNED) == "true"
        shape = Shape(self.placed.memory_gib, self.placed.milli, len(self.placed.gpus), frozenset(self.placed.types))
        return Replica(self.name, self.group, self.state, gpus, shape, since, self.placed.replaces, pinned)


def pod_of(found: Object) -> Pod:
    """Read a pod."""
    try:
        placed = msgspec.json.decode(annotations_of(found).get(PLACED, ""), type=Placed)
    except msgspec.DecodeError:
        placed = None
    return Pod(name_of(found), found["metadata"]["uid"], labels_of(found).get(GROUP, ""), found, placed)


Names = Mapping[tuple[str, str, str], str]
"""Of GPUs, by driver, pool and device."""


def names_of(devices: Iterable[Device]) -> Names:
    """How allocations call these."""
    return {(device.driver, device.pool, device.name): device.gpu for device in devices}


def gpus_of(pod: Pod, claims: Mapping[str, Object], names: Names) -> tuple[str, ...]:
    """Where it is: what its claim was given, or else where it was put."""
    if pod.placed is None:
        return ()
    allocation = (claims.get(pod.placed.claim, {}).get("status") or {}).get("allocation") or {}
    results = allocation.get("devices", {}).get("results") or ()
    given = [names.get((one["driver"], one["pool"], one["device"])) for one in results]
    if len(given) == len(pod.placed.gpus) and all(given):
        return tuple(gpu for gpu in given if gpu is not None)
    return tuple(pod.placed.gpus)


def problems(pods: Iterable[Pod]) -> Iterator[str]:
    """What people should know of pods that do not get on."""
    for pod in pods:
        status = pod.found.get("status") or {}
        scheduled = condition(pod.found, "PodScheduled")
        if pod.placed is None:
            yield f"{pod.name}: its annotation {PLACED} cannot be read; delete the pod"
        elif pod.ended:
            why = status.get("reason") or status["phase"]
            yield f"{pod.name} has ended: {why} {status.get('message') or ''}".strip()
        elif scheduled.get("status") == "False" and not pod.going:
            yield f"{pod.name} is not scheduled: {scheduled.get('message') or scheduled.get('reason')}"
        for one in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
            waiting = (one.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in HOPELESS:
                yield f"{pod.name}: {one['name']} waits: {waiting['reason']} {waiting.get('message') or ''}".strip()
