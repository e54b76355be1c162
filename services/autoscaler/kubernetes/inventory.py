"""From nodes, and in mode dra from ResourceSlices, to the GPUs that there are. Pure.

A node that has not been ready for a while is lost: its GPUs are not in the inventory, so that replicas there are
replaced. GPUs that a driver or device plugin does not show for the moment, on a node that is ready, count as cordoned:
plugins are restarted while what uses their GPUs goes on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from services.autoscaler.kubernetes.config import KubernetesConfig
from services.autoscaler.kubernetes.marks import Object, condition, labels_of, name_of, quantity, seconds
from services.autoscaler.observed import Gpu, Replica

GIB = 1024.0**3
HANDLED = ("node.kubernetes.io/", "node.cloudprovider.kubernetes.io/")
"""Taints by which Kubernetes itself says that a node is not ready or cordoned: those are seen otherwise."""


@dataclass(frozen=True)
class Device:
    """A GPU as its DRA driver shows it."""

    gpu: str
    driver: str
    pool: str
    name: str
    identity: str | None
    """The attribute by which a claim can name it; None: it has none."""
    capacities: frozenset[str]
    shared: bool
    """Whether several claims may be allocated on it, each with some of its capacity."""


@dataclass(frozen=True)
class Inventory:
    """What there is."""

    gpus: tuple[Gpu, ...] = ()
    devices: Mapping[str, Device] = field(default_factory=dict)
    """By GPU; mode dra only."""
    problems: tuple[str, ...] = ()
    nodes: frozenset[str] = frozenset()
    """Those that are ready, or were a moment ago, whether or not they show GPUs."""


@dataclass(frozen=True)
class _Node:
    name: str
    cordoned: bool
    found: Object


def inventory(
    nodes: Iterable[Object], slices: Iterable[Object], tolerations: Sequence[Sequence[Mapping[str, Any]]],
    types: Collection[str], config: KubernetesConfig, now: float,
) -> Inventory:  # fmt: skip
    """The GPUs. `tolerations` are those of every template, `types` what groups call types of GPU."""
    usable = [_Node(name_of(one), _cordoned(one, tolerations, config, now), one) for one in nodes
              if _ours(one, config) and not _lost(one, config, now)]  # fmt: skip
    if config.mode == "dra":
        return _devices(usable, slices, types, config)
    gpus: list[Gpu] = []
    problems: list[str] = []
    for node in usable:
        found = _of_cpu(node) if config.mode == "cpu" else _of_plugin(node, types, config, problems)
        gpus.extend(found)
    return Inventory(tuple(gpus), {}, tuple(problems), frozenset(node.name for node in usable))


def with_hidden(found: Inventory, replicas: Iterable[Replica], nodes: Mapping[str, str]) -> Inventory:
    """Add, cordoned, GPUs that replicas use and that are not shown for the moment. `nodes`: by replica, its node."""
    known = {gpu.name for gpu in found.gpus}
    hidden = {
        gpu: Gpu(gpu, nodes[replica.name], replica.shape.memory_gib, cordoned=True)
        for replica in replicas
        for gpu in replica.gpus
        if gpu not in known and nodes.get(replica.name) in found.nodes
    }
    problems = [f"GPU {name} has replicas and is not shown by its driver" for name in sorted(hidden)]
    return replace(found, gpus=(*found.gpus, *hidden.values()), problems=(*found.problems, *problems))


def _ours(node: Object, config: KubernetesConfig) -> bool:
    return config.node_selector.items() <= labels_of(node).items()


def _lost(node: Object, config: KubernetesConfig, now: float) -> bool:
    ready = condition(node, "Ready")
    if ready.get("status") == "True":
        return False
    return not ready or now - seconds(ready.get("lastTransitionTime")) > config.lost_seconds


def _cordoned(
    node: Object, tolerations: Sequence[Sequence[Mapping[str, Any]]], config: KubernetesConfig, now: float
) -> bool:
    spec = node.get("spec") or {}
    if spec.get("unschedulable") or condition(node, "Ready").get("status") != "True":
        return True
    taints = [one for one in spec.get("taints") or () if one.get("effect") != "PreferNoSchedule"]
    taints = [one for one in taints if not one["key"].startswith(HANDLED)]
    return len(taints) > 0 and not any(
        all(any(_tolerates(each, taint) for each in of_template) for taint in taints) for of_template in tolerations
    )


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator") == "Exists":
        return bool((toleration.get("key") or taint["key"]) == taint["key"])
    same_value = bool((toleration.get("value") or "") == (taint.get("value") or ""))
    return same_value and bool(toleration.get("key") == taint["key"])


def _of_cpu(node: _Node) -> list[Gpu]:
    memory = quantity((node.found.get("status") or {}).get("allocatable", {}).get("memory", 0)) / GIB
    return [Gpu(f"{node.name}/cpu", node.name, memory, "cpu", node.cordoned)]


def _of_plugin(node: _Node, types: Collection[str], config: KubernetesConfig, problems: list[str]) -> list[Gpu]:
    status, labels = node.found.get("status") or {}, labels_of(node.found)
    slots = config.slices if config.mode == "time-slicing" else 1
    many = int(quantity((status.get("capacity") or {}).get(config.resource, 0))) // slots
    healthy = int(quantity((status.get("allocatable") or {}).get(config.resource, 0))) // slots
    if not many:
        return []
    product = next((labels[label] for label in config.type_labels if label in labels), "")
    mib = quantity(labels.get(config.memory_label, 0))
    memory = mib / 1024 if mib else config.memory_gib.get(product, 0.0)
    if not memory:
        problems.append(
            f"node {node.name}: the memory of its GPUs ('{product}') is not known: it has no label"
            f" {config.memory_label}; set kubernetes.memory_gib.'{product}'"
        )
        return []
    type_ = type_of(product, types)
    return [
        Gpu(f"{node.name}/{index}", node.name, memory, type_, node.cordoned or index >= healthy)
        for index in range(many)
    ]


def _devices(
    usable: Sequence[_Node], slices: Iterable[Object], types: Collection[str], config: KubernetesConfig
) -> Inventory:
    cordoned = {node.name: node.cordoned for node in usable}
    gpus: dict[str, Gpu] = {}
    devices: dict[str, Device] = {}
    problems: list[str] = []
    for spec in _newest(slices, config.driver):
        node = spec.get("nodeName", "")
        if node not in cordoned:
            continue
        for one in spec.get("devices") or ():
            attributes, capacity = one.get("attributes") or {}, one.get("capacity") or {}
            if _value(attributes, "type", config.driver) not in (None, "gpu"):
                continue  # a part of one: MIG, or what stands for a virtual machine
            name = f"{node}/{one['name']}"
            memory = quantity(_entry(capacity, config.memory_capacity, config.driver).get("value", 0)) / GIB
            product = _value(attributes, "productName", config.driver) or ""
            memory = memory or config.memory_gib.get(product, 0.0)
            if not memory:
                problems.append(f"device {name} has no capacity '{config.memory_capacity}', so it is not used")
                continue
            tainted = any(taint.get("effect") != "None" for taint in one.get("taints") or ())
            gpus[name] = Gpu(name, node, memory, type_of(product, types), cordoned[node] or tainted)
            devices[name] = Device(
                name, config.driver, spec["pool"]["name"], one["name"],
                _value(attributes, config.device_attribute, config.driver), frozenset(capacity),
                bool(one.get("allowMultipleAllocations")),
            )  # fmt: skip
    found = tuple(gpus[name] for name in sorted(gpus))
    return Inventory(found, devices, tuple(problems), frozenset(cordoned))


def _newest(slices: Iterable[Object], driver: str) -> list[Object]:
    """What the driver publishes: of each pool the newest generation, as older slices are about to go."""
    pools: dict[str, list[Object]] = defaultdict(list)
    for one in slices:
        if one["spec"].get("driver") == driver:
            pools[one["spec"]["pool"]["name"]].append(one["spec"])
    newest = {pool: max(spec["pool"]["generation"] for spec in specs) for pool, specs in pools.items()}
    return [spec for pool, specs in pools.items() for spec in specs if spec["pool"]["generation"] == newest[pool]]


def _entry(named: Mapping[str, Any], name: str, driver: str) -> Mapping[str, Any]:
    """Names without a domain are of the driver's."""
    return named.get(name) or named.get(f"{driver}/{name}") or {}


def _value(attributes: Mapping[str, Any], name: str, driver: str) -> str | None:
    return next((str(value) for value in _entry(attributes, name, driver).values()), None)


def type_of(product: str, types: Collection[str]) -> str:
    """What groups call this product: `H100` for `NVIDIA-H100-80GB-HBM3`; the product's own name if they do not.

    The longest name counts whose words are in the product's, so `A100` and `A100-80GB` may both be in use.
    """
    words = _words(product)
    fitting = [name for name in types if f" {_words(name)} " in f" {words} "]
    return max(fitting, key=lambda name: (len(name), name)) if fitting else product


def _words(name: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))
