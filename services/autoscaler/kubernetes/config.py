"""What the autoscaler is told about its Kubernetes cluster."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shared.contracts.base import Strict

Mode = Literal["dra", "device-plugin", "time-slicing", "cpu"]


class KubernetesConfig(Strict):
    """Where replicas go, and how they get their GPUs."""

    namespace: str = ""
    """Of replicas and the lease. Empty: the autoscaler's own."""
    mode: Mode = "device-plugin"
    """dra: claims on devices, shares of them too. device-plugin: whole GPUs. time-slicing: slots of a GPU, as the
    plugin is configured. cpu: no GPU; a node counts as one, with its memory."""
    kubeconfig: str = ""
    """File to find the API server with. Empty: as a pod, by its service account."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes whose GPUs are the mesh's. Others' pods there are not seen, so they should be its own."""
    resource: str = "nvidia.com/gpu"
    """Extended resource of the device plugin."""
    type_labels: tuple[str, ...] = ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator")
    """Labels of a node that say its type of GPU; the first that is there."""
    memory_label: str = "nvidia.com/gpu.memory"
    """Label of a node with the memory of each GPU in MiB."""
    memory_gib: dict[str, Annotated[float, msgspec.Meta(gt=0)]] = {}
    """Memory by type of GPU, for nodes without that label."""
    slices: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    """time-slicing: slots of each GPU; a replica takes one, so its share is at least 1000 / slices milli."""
    driver: str = "gpu.nvidia.com"
    """dra: whose devices are used."""
    device_class: str = "openrl-gpu"
    """dra: DeviceClass that claims name."""
    device_attribute: str = "uuid"
    """dra: attribute that differs from device to device, by which a claim names one."""
    memory_capacity: str = "memory"
    """dra: a device's capacity that is its memory."""
    compute_capacity: str = "milli"
    """dra: a device's capacity that is its compute in thousandths, where devices may be shared and have one."""
    lease: str = "openrl-autoscaler"
    lease_seconds: Annotated[float, msgspec.Meta(ge=3)] = 15.0
    """Without a renewal for so long, another autoscaler takes over."""
    lost_seconds: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """A node that is not ready counts as cordoned for so long, then as lost: a kubelet that restarts loses nothing."""
    watch_seconds: Annotated[int, msgspec.Meta(ge=1)] = 25
    """A watch is begun anew after so long, from where it was: how a dead connection is noticed."""
    stale_seconds: Annotated[float, msgspec.Meta(gt=0)] = 45.0
    """Without a word from the API server for so long, nothing is decided."""
