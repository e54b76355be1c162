"""A small cluster in which plans are carried out at once: a helper of the tests of the autoscaler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from services.autoscaler.config import GroupConfig, ScalingConfig, ShapeConfig
from services.autoscaler.observed import WHOLE, Gpu, Load, Measured, Observed, Replica, Shape, State
from services.autoscaler.plan import Memory, Plan
from services.autoscaler.policy import decide


def group(
    name: str = "a", *, memory: float = 20, milli: int = 250, gpus: int = 1, types: str = "", **more: object
) -> GroupConfig:
    """A group of samplers with few words."""
    settings: dict[str, object] = {"role": "sampler", "base_model": name, "slots": 10, "max": 100, **more}
    shape = ShapeConfig(memory_gib=memory, milli=WHOLE if gpus > 1 else milli, gpus=gpus, types=types)
    return GroupConfig(name=name, shape=shape, **settings)  # type: ignore[arg-type]


def gpus(*nodes: int, memory: float = 80, type_: str = "H100") -> tuple[Gpu, ...]:
    """Nodes with so many GPUs each."""
    return tuple(
        Gpu(f"n{node}/{index}", f"n{node}", memory, type_) for node, many in enumerate(nodes) for index in range(many)
    )


def load(sequences: float = 0.0, running: float = 0.0, age: float = 0.0) -> Load:
    """Sequences that wait in the queue, and that run."""
    return Load(queued=Measured(sequences, age), running=Measured(running, age), waiting=Measured(0.0, age))


@dataclass
class Cluster:
    """Groups, GPUs and replicas."""

    groups: list[GroupConfig]
    gpus: tuple[Gpu, ...]
    replicas: list[Replica] = field(default_factory=list)
    loads: dict[str, Load] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    now: float = 0.0
    listable: bool = True

    def observed(self) -> Observed:
        return Observed(dict(self.loads), tuple(self.replicas), self.gpus if self.listable else None)

    def plan(self) -> Plan:
        """Plan once; nothing is carried out."""
        plan, self.memory = decide(self.observed(), self.memory, self.groups, self.scaling, self.now)
        return plan

    def carry_out(self, plan: Plan, state: State = "ready", *, drained: bool = True) -> None:
        """Do what the plan says; replicas that drain are gone at once, unless told otherwise."""
        gone = {drain.replica for drain in plan.drains}
        if drained:
            self.replicas = [each for each in self.replicas if each.name not in gone]
        else:
            self.replicas = [replace(each, state="draining") if each.name in gone else each for each in self.replicas]
        self.replicas += [
            Replica(each.replica, each.group, state, each.gpus, each.shape, self.now, each.replaces)
            for each in plan.starts
        ]

    def step(self, seconds: float = 2.0) -> Plan:
        """Let time pass, plan, and carry it out."""
        self.now += seconds
        plan = self.plan()
        self.carry_out(plan)
        return plan

    def steps(self, seconds: float, step: float = 2.0) -> list[Plan]:
        return [self.step(step) for _ in range(round(seconds / step))]

    def count(self, name: str) -> int:
        return sum(each.group == name and each.state != "draining" for each in self.replicas)

    def put(self, name: str, where: Sequence[str], state: State = "ready", **more: object) -> Replica:
        """Put a replica of a group somewhere."""
        config = next(each for each in self.groups if each.name == name)
        number = sum(each.group == name for each in self.replicas)
        replica = Replica(f"{name}-{number}", name, state, tuple(where), config.shape.shape(), **more)  # type: ignore[arg-type]
        self.replicas.append(replica)
        return replica


def check_room(all_gpus: Sequence[Gpu], held: Sequence[tuple[Shape, tuple[str, ...]]]) -> None:
    """No GPU is promised twice, wide replicas are whole and on one node, and types are right."""
    by_name = {gpu.name: gpu for gpu in all_gpus}
    memory: Counter[str] = Counter()
    milli: Counter[str] = Counter()
    for shape, names in held:
        assert len(set(names)) == shape.gpus, "as many GPUs as it needs"
        assert len({by_name[name].node for name in names}) == 1, "on one node"
        for name in names:
            assert not shape.types or by_name[name].type in shape.types
            memory[name] += round(shape.memory_gib * 1024)
            milli[name] += shape.milli
    for name, gpu in by_name.items():
        assert memory[name] <= gpu.memory_gib * 1024, f"memory of {name}"
        assert milli[name] <= WHOLE, f"compute of {name}"
