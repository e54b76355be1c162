"""Snapshots of Alibaba's GPU cluster trace of 2023 (openb): what ran at a time, on GPUs of as many types.

The trace has no memory of GPUs, so compute alone counts here. Where the data come from: docs/autoscaler.md.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from pathlib import Path

from loadtest.packing.instances import Instance, rooms_of
from services.autoscaler.packing.items import WHOLE, Item, Kind, Room

MEMORY = 80
"""GiB of each GPU, of which each pod takes next to nothing."""


def snapshots(directory: Path, number: int, most: int) -> Iterator[Instance]:
    """So many moments, each with at most `most` pods, chosen at random from those that ran."""
    pods = list(csv.DictReader((directory / "openb_pod_list_gpuspec33.csv").open()))
    pods = [pod for pod in pods if pod["scheduled_time"] and int(pod["num_gpu"])]
    rooms = _rooms(directory)
    draw = random.Random("openb")
    times = sorted(float(pod["scheduled_time"]) for pod in pods)
    for count in range(number):
        at = draw.choice(times)
        running = [pod for pod in pods if float(pod["scheduled_time"]) <= at < float(pod["deletion_time"])]
        chosen = draw.sample(running, min(most, len(running)))
        items = tuple(Item(pod["name"], _kind(pod)) for pod in chosen)
        yield Instance(f"openb {count}", "openb", items, _some(rooms, items))


def whole(directory: Path) -> Instance:
    """All pods at once, on all GPUs."""
    pods = csv.DictReader((directory / "openb_pod_list_gpuspec33.csv").open())
    items = tuple(Item(pod["name"], _kind(pod)) for pod in pods if int(pod["num_gpu"]))
    return Instance("openb, all pods", "openb", items, tuple(_rooms(directory)))


def _kind(pod: dict[str, str]) -> Kind:
    types = frozenset(part for part in pod["gpu_spec"].split("|") if part)
    gpus = int(pod["num_gpu"])
    return Kind(1, WHOLE if gpus > 1 else int(pod["gpu_milli"]), gpus, types)


def _rooms(directory: Path) -> list[Room]:
    nodes = csv.DictReader((directory / "openb_node_list_gpu_node.csv").open())
    return rooms_of([(int(node["gpu"]), MEMORY, node["model"]) for node in nodes])


def _some(rooms: list[Room], items: tuple[Item, ...]) -> tuple[Room, ...]:
    """Enough of each type, so that the exact answer can be computed: the first nodes with twice what is asked for."""
    asked = sum(item.kind.milli * item.kind.gpus for item in items) // WHOLE + 8
    kept: list[Room] = []
    for type_ in sorted({room.type for room in rooms}):
        of_type = [room for room in rooms if room.type == type_]
        wanting = sum(
            item.kind.milli * item.kind.gpus for item in items if type_ in item.kind.types or not item.kind.types
        )
        enough = min(asked, 2 * wanting // WHOLE + 8)
        nodes = dict.fromkeys(room.node for room in of_type)
        count = 0
        for node in nodes:
            here = [room for room in of_type if room.node == node]
            if count >= enough:
                break
            kept += here
            count += len(here)
    assert len({room.gpu for room in kept}) == len(kept)
    return tuple(kept)
