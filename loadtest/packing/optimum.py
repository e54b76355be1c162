"""The fewest GPUs that any packing needs, by OR-tools' CP-SAT; None unless it is proved."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise

from ortools.sat.python import cp_model

from loadtest.packing.instances import Instance
from services.autoscaler.packing.items import Kind, Room


@dataclass(frozen=True)
class Optimum:
    """What the solver found."""

    gpus: int | None
    """The fewest GPUs; None: not proved within the time."""
    feasible: bool | None
    """Whether everything can be placed; None: not known."""
    rooms: tuple[Room, ...] = ()
    """GPUs that do: exactly as many."""


def optimum(instance: Instance, seconds: float, at_most: int | None = None) -> Optimum:
    """Solve exactly, knowing perhaps that so many GPUs do."""
    model = _Model(instance)
    if at_most is not None:
        model.model.add(model.total <= at_most)
    model.model.minimize(model.total)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    status = solver.solve(model.model)
    if status == cp_model.OPTIMAL:
        return Optimum(round(solver.objective_value), feasible=True, rooms=model.rooms(solver))
    if status == cp_model.INFEASIBLE:
        return Optimum(None, feasible=False)
    return Optimum(None, feasible=True if status == cp_model.FEASIBLE else None)


class _Model:
    """How many of each kind are on each GPU, or, of those that take several, on each node."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.model = cp_model.CpModel()
        self._kinds = Counter(item.kind for item in instance.items)
        self._placed: dict[Kind, list[cp_model.IntVar]] = defaultdict(list)
        self._opened: dict[str, cp_model.IntVar] = {}
        self._milli: dict[str, cp_model.LinearExprT] = {}
        self._wide_on: dict[str, list[cp_model.LinearExprT]] = defaultdict(list)
        for room in instance.rooms:
            self._add_gpu(room)
        for node in dict.fromkeys(room.node for room in instance.rooms):
            self._add_node(node)
        for kind, count in self._kinds.items():
            self.model.add(sum(self._placed[kind]) == count)
        if all(kind.gpus == 1 for kind in self._kinds):  # else GPUs of different nodes are not alike
            self._order_what_is_alike()
        self.total = sum(self._opened.values()) + sum(part for parts in self._wide_on.values() for part in parts)

    def _add_gpu(self, room: Room) -> None:
        opened = self._opened[room.gpu] = self.model.new_bool_var("")
        inside: list[tuple[Kind, cp_model.IntVar]] = []
        for kind, count in self._kinds.items():
            if kind.gpus == 1 and kind.fits(room):
                most = min(count, room.memory // kind.memory, room.milli // kind.milli)
                inside.append((kind, self.model.new_int_var(0, most, "")))
                self._placed[kind].append(inside[-1][1])
        self._milli[room.gpu] = sum(kind.milli * here for kind, here in inside)
        self.model.add(sum(kind.memory * here for kind, here in inside) <= room.memory * opened)
        self.model.add(self._milli[room.gpu] <= room.milli * opened)

    def _add_node(self, node: str) -> None:
        rooms = [room for room in self.instance.rooms if room.node == node]
        for kind, count in self._kinds.items():
            if kind.gpus > 1 and sum(kind.fits(room) for room in rooms) >= kind.gpus:
                here = self.model.new_int_var(0, min(count, len(rooms) // kind.gpus), "")
                self._placed[kind].append(here)
                self._wide_on[node].append(kind.gpus * here)
        self.model.add(sum(self._opened[room.gpu] for room in rooms) + sum(self._wide_on[node]) <= len(rooms))

    def _order_what_is_alike(self) -> None:
        """GPUs that are alike come in the order of their load, so that the solver tries each arrangement once."""
        alike: dict[tuple[str, int], list[str]] = defaultdict(list)
        for room in self.instance.rooms:
            alike[room.type, room.memory].append(room.gpu)
        for members in alike.values():
            for first, second in pairwise(members):
                self.model.add(self._opened[first] >= self._opened[second])
                self.model.add(self._milli[first] >= self._milli[second])

    def rooms(self, solver: cp_model.CpSolver) -> tuple[Room, ...]:
        """The GPUs that the solution opens, and as many of each node as its wide replicas take."""
        kept: list[Room] = []
        for node in dict.fromkeys(room.node for room in self.instance.rooms):
            rooms = [room for room in self.instance.rooms if room.node == node]
            shared = [room for room in rooms if solver.value(self._opened[room.gpu])]
            wide = sum(round(solver.value(part)) for part in self._wide_on[node])
            kept += shared + [room for room in rooms if room not in shared][:wide]
        return tuple(kept)
