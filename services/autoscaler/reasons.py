"""Says in words, with the numbers, why something was decided."""

from __future__ import annotations

from collections.abc import Sequence

from services.autoscaler.config import GroupConfig
from services.autoscaler.demand import Sample
from services.autoscaler.observed import WHOLE, Gpu, Shape
from services.autoscaler.packing.items import Room
from services.autoscaler.stability import Target

GIB = 1024


def of_target(target: Target, have: int, ready: int, config: GroupConfig) -> str:
    """Why a group should have so many replicas."""
    has = f"{have} of {config.min} to {config.max} replicas" + (f", {have - ready} starting" if have > ready else "")
    if target.why == "hold":
        return f"{config.name}: held at {target.wanted}: {target.missing}; has {has}"
    assert target.sample is not None
    seen = _seen(target.sample, config)
    return f"{config.name}: {seen}; has {has}; {target.wanted} wanted {_because(target, config)}"


def _seen(sample: Sample, config: GroupConfig) -> str:
    if sample.idle:
        return "nothing to do"
    oldest = f", the oldest for {sample.oldest:.0f} s" if sample.oldest >= 1 else ""
    if config.role == "sampler":
        running = sample.busy * sample.slots
        return f"{sample.queue:.0f} sequences waiting{oldest}, {running:.0f} running ({sample.slots:.0f} a replica)"
    calls = f"{sample.calls:.0f} operations and " if sample.calls else ""
    return f"{calls}{sample.queue:.0f} tokens waiting{oldest}, {sample.busy:.1f} replicas busy"


def _because(target: Target, config: GroupConfig) -> str:
    load = ""
    if target.work is not None:
        load = (
            f"for work of {target.work.replicas:.1f} replicas in the last {target.work.seconds:.0f} s"
            f" at {config.target:.0%} each"
        )
    match target.why:
        case "wake":
            return "because the first request waits and there is no replica"
        case "panic":
            return f"{load} (panic: never fewer while load jumps)"
        case "patience":
            return f"{load}, and no fewer yet: more were wanted a short time ago"
        case "idle":
            return f"until it has had nothing to do for {config.idle_seconds:.0f} s (now {target.idle_for:.0f} s)"
        case "zero":
            return f"after {target.idle_for:.0f} s without anything to do"
        case "minimum":
            return f"as its minimum; {target.unbounded} {load}"
        case "maximum":
            return f"as its maximum; {target.unbounded} {load}"
        case _:
            return load


def of_shape(shape: Shape) -> str:
    """What a replica needs."""
    types = f" of type {'|'.join(sorted(shape.types))}" if shape.types else ""
    if shape.gpus > 1:
        return f"{shape.gpus} whole GPUs{types} of one node with {shape.memory_gib:g} GiB each"
    share = "a whole GPU" if shape.milli == WHOLE else f"{shape.milli / WHOLE:g} of a GPU"
    return f"{share}{types} with {shape.memory_gib:g} GiB"


def of_no_room(config: GroupConfig, shape: Shape, rooms: Sequence[Room], gpus: Sequence[Gpu]) -> str:
    """Why a replica cannot be placed."""
    able = [
        gpu
        for gpu in gpus
        if gpu.memory_gib >= shape.memory_gib and (not shape.types or gpu.type in shape.types) and not gpu.cordoned
    ]
    text = f"{config.name}: no room for a replica that needs {of_shape(shape)}"
    if not able:
        return f"{text}: none of {len(gpus)} GPUs would do even if it were empty"
    names = {gpu.name for gpu in able}
    free = [room for room in rooms if room.gpu in names]
    if shape.gpus > 1:
        per_node: dict[str, int] = {}
        for room in free:
            per_node[room.node] = per_node.get(room.node, 0) + (room.milli == WHOLE and not room.used)
        most = max(per_node.values(), default=0)
        return f"{text}: of {len(able)} GPUs that would do, at most {most} of one node are free"
    best = max(free, key=lambda room: (min(room.milli / shape.milli, room.memory / GIB / shape.memory_gib), room.gpu))
    has = f"{best.gpu} with {best.milli / WHOLE:g} and {best.memory / GIB:g} GiB free"
    others = f"replicas of its priority ({config.priority}) or more hold the rest"
    return f"{text}: of {len(able)} GPUs that would do, the best is {has}, and {others}"


def of_start(config: GroupConfig, wanted: int, shape: Shape, gpus: Sequence[str]) -> str:
    """Why a replica starts where it does."""
    return f"{config.name}: one of {wanted} wanted, with {of_shape(shape)}, on {', '.join(gpus)}"
