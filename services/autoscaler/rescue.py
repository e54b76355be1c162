"""Makes room for a replica that fits nowhere: others move, and if that is not enough, lower priorities give way. Pure.

It looks at one node first, then two, four, and so on, those with most to gain first, packs what is there again
together with the replica, and takes the first answer: so what moves is near, and little. What it gives up is of the
lowest priority that will do, and of that what came last. Replicas on several GPUs are given up but never moved.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from services.autoscaler.observed import WHOLE, Replica
from services.autoscaler.packing.items import Item, Kind, Placement, Room
from services.autoscaler.packing.pack import pack, pack_all
from services.autoscaler.placing import kind_of

EFFORT = 300
MOST_NODES = 32


@dataclass(frozen=True)
class Relocation:
    """How room is made."""

    gpus: tuple[str, ...]
    """Where the replica then goes."""
    moves: tuple[tuple[Replica, tuple[str, ...]], ...] = ()
    victims: tuple[Replica, ...] = ()
    """Those that have to go. Where a place was found for one that has not even started, it will be started there."""


@dataclass(frozen=True)
class Others:
    """The replicas that might make room."""

    replicas: Sequence[Replica]
    priorities: Mapping[str, int]
    """By group."""

    def willing(self, level: int | None) -> list[Replica]:
        """Those that may be moved, and those of priority `level` or less, which may be given up."""
        return [
            replica
            for replica in self.replicas
            if (level is not None and self.priorities[replica.group] <= level)
            or (replica.state == "ready" and len(replica.gpus) == 1)
        ]


def make_room(item: Item, priority: int, rooms: Sequence[Room], others: Others) -> Relocation | None:
    """Find room for an item. `rooms` is what is free; None: there is no way."""
    lower = sorted({others.priorities[replica.group] for replica in others.replicas})
    for level in [None, *(each for each in lower if each < priority)]:
        for nearby, replicas in _neighbourhoods(item.kind, rooms, others.willing(level)):
            found = _repack(item, nearby, replicas, level, others)
            if found is not None:
                return found
    return None


def _neighbourhoods(
    kind: Kind, rooms: Sequence[Room], replicas: Sequence[Replica]
) -> Iterator[tuple[list[Room], list[Replica]]]:
    """More and more nodes, with their GPUs as if the replicas were not there."""
    by_gpu = {room.gpu: room for room in rooms}
    taken: dict[str, list[Replica]] = defaultdict(list)
    for replica in replicas:
        if all(gpu in by_gpu for gpu in replica.gpus):
            for gpu in replica.gpus:
                taken[gpu].append(replica)
    nodes: dict[str, list[Room]] = defaultdict(list)
    gain: Counter[str] = Counter()
    for room in rooms:
        cleared = _cleared(room, taken[room.gpu])
        nodes[room.node].append(cleared)
        if cleared.milli:
            gain[room.node] += 1 + room.milli + (cleared.milli if kind.gpus > 1 and kind.fits(cleared) else 0)
    best = sorted((node for node in nodes if gain[node]), key=lambda node: (-gain[node], node))
    number = 1
    while best:
        chosen = best[:number]
        nearby = [room for node in chosen for room in nodes[node]]
        nearby.sort(key=lambda room: (by_gpu[room.gpu].used, -by_gpu[room.gpu].milli))
        names = {room.gpu for room in nearby}
        here = {replica.name: replica for gpu in names for replica in taken[gpu]}
        yield nearby, [here[name] for name in sorted(here)]
        if number >= len(best) or number >= MOST_NODES:
            return
        number *= 2


def _cleared(room: Room, replicas: Sequence[Replica]) -> Room:
    """The room as if these were not there. What remains used has others on it."""
    kinds = [kind_of(replica.shape) for replica in replicas]
    memory = room.memory + sum(kind.memory for kind in kinds)
    milli = room.milli + sum(kind.milli for kind in kinds)
    return Room(room.gpu, room.node, room.type, memory, milli, used=room.used and milli < WHOLE)


def _repack(
    item: Item, nearby: Sequence[Room], replicas: Sequence[Replica], level: int | None, others: Others
) -> Relocation | None:
    def gives(replica: Replica) -> bool:
        return level is not None and others.priorities[replica.group] <= level

    stay = [replica for replica in replicas if not gives(replica)]
    give = sorted(
        (replica for replica in replicas if gives(replica)),
        key=lambda replica: (-others.priorities[replica.group], replica.since, replica.name),
    )
    must = [*(Item(replica.name, kind_of(replica.shape)) for replica in stay), item]
    may = [Item(replica.name, kind_of(replica.shape)) for replica in give]
    if level is None:
        placement = pack_all(must, nearby, EFFORT)
    else:
        placement = pack([*must, *may], nearby, EFFORT)
        if any(one.name not in placement for one in must):
            return None
    if placement is None:
        return None
    placement = stay_where_possible(placement, item, replicas, nearby)
    return _differences(item, placement, replicas)


def _differences(item: Item, placement: Placement, replicas: Sequence[Replica]) -> Relocation:
    moves, victims = [], []
    for replica in replicas:
        gpus = placement.get(replica.name)
        if gpus is None or (set(gpus) != set(replica.gpus) and (replica.state == "starting" or len(gpus) > 1)):
            victims.append(replica)
        elif set(gpus) != set(replica.gpus):
            moves.append((replica, gpus))
    return Relocation(placement[item.name], tuple(moves), tuple(victims))


def stay_where_possible(
    placement: Placement, item: Item, replicas: Sequence[Replica], nearby: Sequence[Room]
) -> Placement:
    """The same packing with GPUs that are alike, and replicas that are alike, swapped so that few of them move."""
    kinds = {replica.name: kind_of(replica.shape) for replica in replicas} | {item.name: item.kind}
    now: dict[str, Counter[Kind]] = defaultdict(Counter)
    names_now: dict[tuple[str, Kind], list[str]] = defaultdict(list)
    for replica in replicas:
        if len(replica.gpus) == 1:
            now[replica.gpus[0]][kinds[replica.name]] += 1
            names_now[replica.gpus[0], kinds[replica.name]].append(replica.name)
    wide = {name: gpus for name, gpus in placement.items() if len(gpus) > 1}
    then: dict[str, Counter[Kind]] = defaultdict(Counter)
    for name, gpus in placement.items():
        if name not in wide:
            then[gpus[0]][kinds[name]] += 1
    renamed = _renamed(now, then, nearby, {gpu for gpus in wide.values() for gpu in gpus})
    wanted = {(renamed[gpu], kind): times for gpu, content in then.items() for kind, times in content.items()}
    result = dict(wide)
    left: dict[Kind, list[str]] = defaultdict(list)
    single = [name for name in placement if name not in wide]
    for name in single:
        left[kinds[name]].append(name)
    for (gpu, kind), times in wanted.items():
        for name in [name for name in names_now[gpu, kind] if name in placement][:times]:
            result[name] = (gpu,)
            left[kind].remove(name)
            wanted[gpu, kind] -= 1
    for (gpu, kind), times in wanted.items():
        for _ in range(times):
            result[left[kind].pop()] = (gpu,)
    return result


def _renamed(
    now: Mapping[str, Counter[Kind]], then: Mapping[str, Counter[Kind]], nearby: Sequence[Room], kept: set[str]
) -> dict[str, str]:
    """For each GPU of the packing, the GPU like it whose content now is most like what it is to be."""
    alike: dict[tuple[str, int, int, bool], list[str]] = defaultdict(list)
    for room in nearby:
        if room.gpu not in kept:
            alike[room.type, room.memory, room.milli, room.used].append(room.gpu)
    renamed: dict[str, str] = {}
    for gpus in alike.values():
        overlaps = sorted(
            (-sum((now[gpu] & then[target]).values()), target, gpu)
            for target in gpus
            if target in then
            for gpu in gpus
            if gpu in now or gpu == target
        )
        free, open_ = dict.fromkeys(gpus), {target for target in gpus if target in then}
        for _, target, gpu in overlaps:
            if target in open_ and gpu in free:
                renamed[target] = gpu
                open_.discard(target)
                del free[gpu]
        renamed |= dict(zip(sorted(open_), free, strict=False))
    return renamed
