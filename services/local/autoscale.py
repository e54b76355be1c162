"""`openrl up --autoscale`: what the autoscaler of one machine is told, and what it decides."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.local.client import connected
from services.local.config import Paths, ServiceCommand, Setting, service_command, slugs
from services.local.printing import duration, table
from shared import topology
from shared.contracts.placement import NEWEST_PLAN, GpuRecord, PlanRecord
from shared.errors import UserError

GIB = 1 << 30
ENGINE_GIB = 2.0
"""What an engine needs besides weights: activations, caches, the runtime."""
SLOTS = 128
"""`max_sequences` of a sampler."""
SHARE = 250
"""Thousandths of a GPU that a replica may use: four share one."""
MOST_SAMPLERS = 3
IDLE_SECONDS = 120.0
START_SECONDS = 20.0
SCALING = {"tick_seconds": 1.0, "down_seconds": 60.0, "settle_seconds": 60.0}
"""One machine starts and stops replicas in seconds, so patience may be short."""


def command(models: Mapping[str, Path], prometheus_url: str, *, dry_run: bool) -> ServiceCommand:
    """The autoscaler of these models. OPENRL_AUTOSCALER_GROUPS and _SCALING, where they are set, go before."""
    own = {
        "OPENRL_AUTOSCALER_GROUPS": json.dumps(groups(models)),
        "OPENRL_AUTOSCALER_SCALING": json.dumps(SCALING),
    }
    environment = {name: value for name, value in own.items() if name not in os.environ}
    config: dict[str, Setting] = {"prometheus_url": prometheus_url, "dry_run": dry_run}
    return service_command("autoscaler", config=config, environment=environment)


def groups(models: Mapping[str, Path]) -> list[dict[str, Any]]:
    """A group of samplers and one of trainers for each model. A run stays with its trainer, so one trainer serves."""
    found = []
    for (name, directory), slug in zip(models.items(), slugs(models), strict=True):
        memory = round(sum(path.stat().st_size for path in directory.glob("*.safetensors")) / GIB + ENGINE_GIB, 1)
        common = {
            "base_model": name,
            "shape": {"memory_gib": memory, "milli": SHARE},
            "idle_seconds": IDLE_SECONDS,
            "start_seconds": START_SECONDS,
        }
        found += [
            {"name": f"{slug}-samplers", "role": "sampler", "max": MOST_SAMPLERS, "slots": SLOTS, **common},
            {"name": f"{slug}-trainers", "role": "trainer", "max": 1, "priority": 1, **common},
        ]
    return found


async def newest(paths: Paths) -> PlanRecord:
    """The newest plan. Raise `UserError` if there is none."""
    async with connected(paths) as bus:
        entry = await bus.table(topology.PLANS).get(NEWEST_PLAN)
    if entry is None:
        raise UserError("there is no plan: start the mesh with `openrl up --autoscale`")
    return entry.value


def text(plan: PlanRecord, now: float, *, explain: bool) -> str:
    """A plan for people: what is where, what changes, and why."""
    dry = ", dry run: nothing of it is done" if plan.dry_run else ""
    heading = f"plan of {duration(max(0.0, now - plan.at))} ago: {plan.gpus_used} of {len(plan.gpus)} GPUs used{dry}"
    parts = [heading]
    if plan.frozen:
        parts.append(plan.frozen)
    groups = [(group.group, group.have, group.wanted, group.reason) for group in plan.groups]
    parts.append(table(("GROUP", "HAS", "WANTED", "WHY"), groups))
    parts.append(table(("GPU", "MEMORY", "REPLICA", "SHARE", "STATE", "WHY"), _placements(plan)))
    parts += [f"unmet: {reason}" for reason in plan.unmet]
    if explain:
        parts.append(table(("GROUP", "MEASURED", "VALUE"), _measured(plan)))
    return "\n\n".join(parts)


def _placements(plan: PlanRecord) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for gpu in plan.gpus:
        here = [replica for replica in plan.replicas if gpu.name in replica.gpus]
        size = f"{sum(replica.memory_gib for replica in here):.1f} of {gpu.memory_gib:.0f} GiB"
        for number, replica in enumerate(here):
            first = (_name(gpu), size) if number == 0 else ("", "")
            rows.append((*first, replica.replica, f"{replica.milli / 10:g} %", replica.state, replica.reason))
        if not here:
            rows.append((_name(gpu), size, "-", "", "", ""))
    return rows


def _name(gpu: GpuRecord) -> str:
    return f"{gpu.name} ({gpu.type})" if gpu.type else gpu.name


def _measured(plan: PlanRecord) -> list[tuple[str, str, str]]:
    return [
        (group.group, name, f"{value:g}") for group in plan.groups for name, value in sorted(group.load.items())
    ] or [("-", "nothing: Prometheus does not answer, or nothing runs yet", "")]
