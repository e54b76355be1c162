"""What is free on GPUs, now and when those that leave are gone; and which replicas to give up. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.autoscaler.observed import WHOLE, Gpu, Observed, Replica, Shape
from services.autoscaler.packing.items import Kind, Room

MIB = 1024
"""MiB of a GiB."""


def kind_of(shape: Shape) -> Kind:
    """What a replica needs, in whole numbers. Memory is rounded up."""
    return Kind(max(1, -int(-shape.memory_gib * MIB // 1)), shape.milli, shape.gpus, shape.types)


def rooms(gpus: Iterable[Gpu], replicas: Iterable[Replica]) -> dict[str, Room]:
    """What these replicas leave free, by GPU. More than there is may be in use, by mistake: then nothing is free."""
    memory: Counter[str] = Counter()
    milli: Counter[str] = Counter()
    for replica in replicas:
        kind = kind_of(replica.shape)
        for gpu in replica.gpus:
            memory[gpu] += kind.memory
            milli[gpu] += kind.milli if kind.gpus == 1 else WHOLE
    return {
        gpu.name: Room(
            gpu.name, gpu.node, gpu.type, max(0, int(gpu.memory_gib * MIB) - memory[gpu.name]),
            max(0, WHOLE - milli[gpu.name]), used=gpu.name in milli,
        )
        for gpu in gpus
    }  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """The replicas, sorted by what is to become of them."""

    counted: Mapping[str, tuple[Replica, ...]]
    """By group, those that serve or will: on the move only the old one, until the new one is ready."""
    successors: Mapping[str, Replica]
    """By name of the old replica, the new one that is starting."""
    moved: tuple[tuple[Replica, Replica], ...]
    """Old ones whose new one is ready, with it."""
    lost: tuple[Replica, ...]
    """Those on GPUs that are no longer there."""
    unknown: tuple[Replica, ...]
    """Those of groups that are not configured any more."""

    def have(self, group: str) -> int:
        """Replicas that start or are ready, those on the move once."""
        return len(self.counted.get(group, ()))


def standing(observed: Observed, groups: Collection[str]) -> Standing:
    """Sort the replicas."""
    inventory = {gpu.name for gpu in observed.gpus or ()}
    staying: dict[str, Replica] = {}
    lost, unknown = [], []
    for replica in observed.replicas:
        if replica.state == "draining":
            continue
        if any(gpu not in inventory for gpu in replica.gpus):
            lost.append(replica)
        elif replica.group not in groups and not replica.pinned:
            unknown.append(replica)
        else:
            staying[replica.name] = replica
    successors: dict[str, Replica] = {}
    moved: list[tuple[Replica, Replica]] = []
    for replica in staying.values():
        old = staying.get(replica.replaces)
        if old is None or old.group != replica.group or old.pinned:
            continue
        if replica.state == "ready":
            moved.append((old, replica))
        else:
            successors.setdefault(old.name, replica)
    apart = {old.name for old, _ in moved} | {new.name for new in successors.values()}
    counted: dict[str, list[Replica]] = defaultdict(list)
    for replica in staying.values():
        if replica.name not in apart:
            counted[replica.group].append(replica)
    return Standing(
        {group: tuple(members) for group, members in counted.items()}, successors, tuple(moved),
        tuple(lost), tuple(unknown),
    )  # fmt: skip


def surplus(members: Sequence[Replica], number: int, used: Mapping[str, Room]) -> list[Replica]:
    """Which replicas to give up: those still starting, then those on the emptiest GPUs, then the youngest."""

    def rank(replica: Replica) -> tuple[bool, int, str, float, str]:
        free = sum(used[gpu].milli for gpu in replica.gpus if gpu in used) if len(replica.gpus) < 2 else 0
        return replica.state != "starting", -free, ",".join(replica.gpus), -replica.since, replica.name

    return sorted((replica for replica in members if not replica.pinned), key=rank)[: max(0, number)]


class Names:
    """Gives names to new replicas: the group's name and the lowest number that nobody has."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)
        self._next: Counter[str] = Counter()

    def new(self, group: str) -> str:
        """A name that was not there."""
        while (name := f"{group}-{self._next[group]}") in self._taken:
            self._next[group] += 1
        self._taken.add(name)
        return name
