"""What is started, moved and stopped next. Pure: an observation, a memory and the time in; a plan and a memory out.

1. Each group gets a number of replicas (`demand`, `stability`).
2. What has to go is drained: replicas that others have replaced, that are too many, or whose GPU is no longer there.
3. What is wanted is placed on the fewest GPUs (`packing`), the first of every group before higher priorities, without
   touching what runs. Where that fails, room is made (`rescue`): others move, then lower priorities give way.
4. When there is nothing of that to do, GPUs are freed (`consolidate`).

Nothing is started before there is room for it: what is draining still holds its share. A replica moves by being
started where it should be; the old one is drained when the new one is ready. That a replica is on the move is seen in
the observation (`Replica.replaces`), so a planner that is restarted goes on where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.autoscaler import reasons
from services.autoscaler.config import GroupConfig, ScalingConfig
from services.autoscaler.consolidate import gpus_to_free
from services.autoscaler.demand import sample
from services.autoscaler.observed import Observed, Replica, Shape
from services.autoscaler.packing.items import Item, Room
from services.autoscaler.packing.pack import pack
from services.autoscaler.placing import Names, Standing, kind_of, rooms, standing, surplus
from services.autoscaler.plan import Drain, GroupPlan, Memory, Plan, Start, Unmet
from services.autoscaler.rescue import Others, Relocation, make_room, rank
from services.autoscaler.stability import GroupMemory, target

LAST = 1 << 31
"""Place of a replica that only moves: it has its GPUs already."""
RESCUES = 4
"""Kinds of replica for which room is made in one plan, so that a crowded cluster is planned in time."""


@dataclass(frozen=True)
class Wanted:
    """A replica that is to be started somewhere."""

    name: str
    config: GroupConfig
    shape: Shape
    nth: int
    """How many of its group come before it: at equal rank, groups take turns."""
    replaces: str = ""

    @property
    def rank(self) -> int:
        """What gives way to it, if need be."""
        return rank(self.config.priority, self.nth, self.config.min)

    @property
    def item(self) -> Item:
        """The same, to be packed."""
        return Item(self.name, kind_of(self.shape))


def decide(
    observed: Observed, memory: Memory, groups: Sequence[GroupConfig], scaling: ScalingConfig, now: float
) -> tuple[Plan, Memory]:
    """Plan from what is observed at the time `now`."""
    if observed.gpus is None:
        return Plan(
            frozen="the GPUs of the cluster could not be listed, so nothing is started, moved or stopped"
        ), memory
    configs = {config.name: config for config in groups}
    stand = standing(observed, configs)
    planned, remembered = _targets(observed, stand, memory, groups, scaling, now)
    draft = _Draft(observed, stand, configs, planned)
    draft.drain_what_has_to_go()
    draft.place_what_is_wanted()
    if not draft.unmet and not draft.drains and not draft.starts:
        settled = {
            name: configs[name].start_seconds
            for name, group in planned.items()
            if group.target.why != "hold" and now - remembered[name].changed >= scaling.settle_seconds
        }
        draft.free_gpus(settled, scaling)
    return draft.plan(), Memory(remembered)


def _targets(
    observed: Observed, stand: Standing, memory: Memory, groups: Sequence[GroupConfig], scaling: ScalingConfig,
    now: float,
) -> tuple[dict[str, GroupPlan], dict[str, GroupMemory]]:  # fmt: skip
    planned: dict[str, GroupPlan] = {}
    remembered: dict[str, GroupMemory] = {}
    for config in groups:
        have = stand.have(config.name)
        ready = sum(replica.state == "ready" for replica in stand.counted.get(config.name, ()))
        found = sample(observed.loads.get(config.name), config, ready, scaling.fresh_seconds, now)
        before = memory.groups.get(config.name, GroupMemory())
        wanted, after = target(found, have, ready, before, config, scaling, now)
        changed = before.wanted is not None and before.wanted != wanted.wanted
        reason = reasons.of_target(wanted, have, ready, config)
        planned[config.name] = GroupPlan(config.name, have, wanted, reason, changed)
        remembered[config.name] = after
    return planned, remembered


class _Draft:
    """A plan while it is made."""

    def __init__(
        self, observed: Observed, stand: Standing, configs: Mapping[str, GroupConfig], planned: Mapping[str, GroupPlan]
    ) -> None:
        assert observed.gpus is not None
        self._observed, self._stand, self._configs, self._planned = observed, stand, configs, planned
        self._gpus = observed.gpus
        self._usable = {gpu.name for gpu in observed.gpus if not gpu.cordoned}
        # A replica that has moved still says whom it replaced: a new one of that name would be taken for the old one.
        self._names = Names(name for replica in observed.replicas for name in (replica.name, replica.replaces))
        self._leaving = {replica.name for replica in observed.replicas if replica.state == "draining"}
        self._leaving |= set(stand.successors)
        self.starts: list[Start] = []
        self.drains: list[Drain] = []
        self.unmet: list[Unmet] = []
        self._now = rooms(self._gpus, observed.replicas)
        """What is free now."""
        self._later = dict(self._now)
        """What is free when all that leaves has left."""
        self._reserved: list[Replica] = []
        """What is started by this plan, or will be when there is room."""

    def drain_what_has_to_go(self) -> None:
        """Replicas that are lost, replaced, of no known group, or too many."""
        for replica in self._stand.lost:
            gone = ", ".join(gpu for gpu in replica.gpus if gpu not in self._now)
            self._drain(replica, f"{replica.group}: {replica.name} was on {gone}, which is no longer there", "lost")
        for replica in self._stand.unknown:
            self._drain(replica, f"{replica.name}: no group '{replica.group}' is configured", "unknown")
        for old, new in self._stand.moved:
            where = ", ".join(new.gpus)
            self._drain(old, f"{old.group}: {new.name} on {where} is ready and replaces {old.name}", "moved")
        for name, group in self._planned.items():
            members = self._stand.counted.get(name, ())
            for replica in surplus(members, len(members) - group.target.wanted, self._now):
                self._drain(replica, f"{replica.name} is one too many. {group.reason}")
                if successor := self._stand.successors.get(replica.name):
                    self._drain(successor, f"{successor.name} was to replace {replica.name}, which is one too many")
        self._later = rooms(self._gpus, [each for each in self._observed.replicas if each.name not in self._leaving])

    def _drain(self, replica: Replica, reason: str, cause: str = "surplus") -> None:
        if replica.name not in self._leaving or cause != "moved":
            self.drains.append(Drain(replica.name, replica.group, reason, cause))  # type: ignore[arg-type]
        self._leaving.add(replica.name)

    def place_what_is_wanted(self) -> None:
        """New replicas, and those that have to leave cordoned GPUs."""
        wanted = sorted(
            [*self._missing(), *self._on_cordoned()],
            key=lambda each: (-each.rank, each.nth, each.config.name, each.name),
        )
        if not wanted:
            return
        placement = pack([each.item for each in wanted], self._free(self._now))
        if len(placement) < len(wanted):
            later = pack([each.item for each in wanted], self._free(self._later))
            placement = later if len(later) > len(placement) else placement
        homeless = []
        for each in wanted:
            if each.name in placement:
                self._start_when_possible(each, placement[each.name])
            else:
                homeless.append(each)
        self._rescue(homeless)

    def _missing(self) -> list[Wanted]:
        return [
            Wanted(self._names.new(name), self._configs[name], self._configs[name].shape.shape(), nth)
            for name, group in self._planned.items()
            for nth in range(self._stand.have(name), group.target.wanted)
        ]

    def _on_cordoned(self) -> list[Wanted]:
        cordoned = {gpu.name for gpu in self._gpus if gpu.cordoned}
        return [
            Wanted(self._names.new(name), self._configs[name], replica.shape, LAST, replaces=replica.name)
            for name, members in self._stand.counted.items()
            if name in self._configs
            for replica in members
            if not replica.pinned and replica.name not in self._leaving and cordoned & set(replica.gpus)
        ]

    def _free(self, free: Mapping[str, Room]) -> list[Room]:
        return [room for gpu, room in free.items() if gpu in self._usable]

    def _start_when_possible(self, wanted: Wanted, gpus: tuple[str, ...], why: str = "") -> bool:
        """Reserve the GPUs, and start if there is room already."""
        kind = wanted.item.kind
        fits = all(kind.fits(self._now[gpu]) for gpu in gpus)
        config = wanted.config
        self._reserve(wanted, gpus)
        if not fits:
            reason = f"{config.name}: {wanted.name} waits until what is leaving {', '.join(gpus)} has gone"
            self.unmet.append(Unmet(config.name, reason, soon=True, replaces=wanted.replaces))
            return False
        self._now.update({gpu: self._now[gpu].without(kind) for gpu in gpus})
        if not why and wanted.replaces:
            why = f"{config.name}: {wanted.name} on {', '.join(gpus)} is to replace {wanted.replaces} on a cordoned GPU"
        elif not why:
            why = reasons.of_start(config, self._planned[config.name].target.wanted, wanted.shape, gpus)
        self.starts.append(Start(wanted.name, config.name, gpus, wanted.shape, why, wanted.replaces))
        return True

    def _reserve(self, wanted: Wanted, gpus: tuple[str, ...]) -> None:
        self._reserved.append(Replica(wanted.name, wanted.config.name, "starting", gpus, wanted.shape))
        self._later.update({gpu: self._later[gpu].without(wanted.item.kind) for gpu in gpus})

    def _rescue(self, homeless: Sequence[Wanted]) -> None:
        tried: dict[tuple[object, int], None] = {}
        said: dict[tuple[str, Shape], str] = {}
        for wanted in homeless:
            key = (wanted.item.kind, wanted.rank)
            found = None
            if key not in tried and len(tried) < RESCUES and not wanted.replaces:
                found = make_room(wanted.item, wanted.rank, self._free(self._later), self._others())
            if found is None:
                tried[key] = None
                self.unmet.append(self._no_room(wanted, said))
            else:
                said.clear()
                self._relocate(wanted, found)

    def _others(self) -> Others:
        held = {name for name, group in self._planned.items() if group.target.why == "hold"}
        apart = self._leaving | {start.replaces for start in self.starts}
        replicas: list[Replica] = []
        places: dict[str, int] = {}
        for name, members in self._stand.counted.items():
            staying = [replica for replica in members if replica.name not in apart]
            if name in self._configs and name not in held:
                replicas += [replica for replica in staying if not replica.pinned]
            for place, replica in enumerate(sorted(staying, key=lambda each: (each.since, each.name))):
                places[replica.name] = place
        ranks = {each.name: self._rank(each, places[each.name]) for each in replicas}
        return Others(replicas, ranks, places)

    def _rank(self, replica: Replica, place: int) -> int:
        config = self._configs[replica.group]
        return rank(config.priority, place, config.min)

    def _no_room(self, wanted: Wanted, said: dict[tuple[str, Shape], str]) -> Unmet:
        key = (wanted.config.name, wanted.shape)
        if key not in said:
            said[key] = reasons.of_no_room(wanted.config, wanted.shape, self._free(self._later), self._gpus)
        return Unmet(wanted.config.name, said[key], replaces=wanted.replaces)

    def _relocate(self, wanted: Wanted, found: Relocation) -> None:
        """Give up the victims, move what is to move, and reserve the room."""
        first = ", the first of its group" if wanted.nth == 0 else ""
        for victim in found.victims:
            reason = (
                f"{victim.group}: {victim.name} (priority {self._configs[victim.group].priority}) makes room for"
                f" {wanted.name} (priority {wanted.config.priority}{first}), which fits nowhere else"
            )
            self._drain(victim, reason, "preempted")
        self._leaving |= {replica.name for replica, _ in found.moves}
        staying = [each for each in self._observed.replicas if each.name not in self._leaving]
        self._later = rooms(self._gpus, [*staying, *self._reserved])
        for replica, gpus in found.moves:
            self._move(replica, gpus, f"to make room for {wanted.name}, which fits nowhere else")
        self._start_when_possible(wanted, found.gpus)

    def _move(self, replica: Replica, gpus: tuple[str, ...], purpose: str) -> None:
        config = self._configs[replica.group]
        new = Wanted(self._names.new(replica.group), config, replica.shape, LAST, replaces=replica.name)
        where = f"from {', '.join(replica.gpus)} to {', '.join(gpus)}"
        if all(new.item.kind.fits(self._now[gpu]) for gpu in gpus):
            self._start_when_possible(new, gpus, f"{replica.group}: {replica.name} moves {where} {purpose}")
        else:
            self._reserve(new, gpus)
            reason = (
                f"{replica.group}: {replica.name} moves {where} {purpose}; drained first, as there is no room for both"
            )
            self.drains.append(Drain(replica.name, replica.group, reason, "moved"))

    def free_gpus(self, settled: Mapping[str, float], scaling: ScalingConfig) -> None:
        """Move replicas of groups that have settled off GPUs that are nearly empty."""
        budget = scaling.most_moves - len(self._stand.successors)
        freed = gpus_to_free(
            self._free(self._now), self._observed.replicas, self._stand.successors, settled, budget,
            scaling.payback_seconds,
        )  # fmt: skip
        for each in freed:
            for replica, gpu in each.moves:
                self._leaving.add(replica.name)
                purpose = f"so that {each.gpu} is free, at {each.cost:.0f} GPU seconds of starting"
                self._move(replica, (gpu,), purpose)

    def plan(self) -> Plan:
        """What has been decided."""
        used = {gpu for replica in self._observed.replicas if replica.name not in self._leaving for gpu in replica.gpus}
        used |= {gpu for start in self.starts for gpu in start.gpus}
        return Plan(
            tuple(self._planned.values()), tuple(self.starts), tuple(self.drains), tuple(self.unmet),
            gpus=len(self._gpus), gpus_used=len(used & set(self._now)),
        )  # fmt: skip
