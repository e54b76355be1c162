"""What `openrl status` shows: services as the supervisor sees them, with what they say of themselves, and the jobs."""

from __future__ import annotations

import shutil
import time
from typing import Any

from services.local.client import connected, jobs
from services.local.config import Paths
from services.local.health import replicas
from services.local.keys import url_of
from services.local.machine import readable, tree_size
from services.local.printing import duration, job_summary, shortened, table
from services.local.state import MeshState, ServiceState, running_state
from shared.contracts.jobs import FINISHED
from shared.contracts.replicas import ReplicaRecord
from shared.errors import MeshError

FINISHED_SHOWN = 5
REASON_WIDTH = 60


async def status(paths: Paths) -> dict[str, Any]:
    """Everything, as plain data. Without a running mesh, only what lies on disk."""
    state = running_state(paths)
    answer: dict[str, Any] = {"running": state is not None, "data": str(paths.root), "disk": _disk(paths)}
    if state is None:
        return answer
    living, records, problem = await _asked(paths, state)
    gateway = next((url for record in living.values() if (url := url_of(record)) is not None), None)
    return answer | {
        "pid": state.pid,
        "phase": state.phase,
        "nats_url": state.nats_url,
        "gateway_url": gateway,
        "uptime_s": round(time.time() - state.started, 1),
        "services": [_service(service, living.get(service.name)) for service in state.services],
        "jobs": records,
        "problem": problem,
    }


def all_ready(answer: dict[str, Any]) -> bool:
    """Whether a mesh is running and each of its services can work."""
    return bool(answer["running"]) and all(service["state"] == "ready" for service in answer["services"])


def text(answer: dict[str, Any], *, all_jobs: bool = False) -> str:
    """The same for people: open jobs and the newest finished ones, unless they want `all_jobs`."""
    disk = answer["disk"]
    room = f"disk  {readable(disk['free'])} free; bus {readable(disk['bus'])}, blobs {readable(disk['blobs'])}"
    if not answer["running"]:
        return f"no mesh is running on {answer['data']}\n{room}"
    heading = (
        f"mesh on {answer['data']}, {answer['phase']}, up for {duration(answer['uptime_s'])}, process {answer['pid']}\n"
        f"nats  {answer['nats_url']}\n{_gateway(answer)}{room}"
    )
    parts = [heading, _services(answer["services"])]
    if answer["jobs"]:
        parts.append(_jobs(answer["jobs"], all_jobs=all_jobs))
    if answer["problem"]:
        parts.append(answer["problem"])
    return "\n\n".join(parts)


def _gateway(answer: dict[str, Any]) -> str:
    if not answer["gateway_url"]:
        return ""
    return f"http  {answer['gateway_url']} for tinker clients; the key is in {answer['data']}/api_key\n"


def _jobs(jobs: list[dict[str, Any]], *, all_jobs: bool) -> str:
    finished = [job["job"] for job in jobs if job["phase"] in FINISHED]
    hidden = set() if all_jobs else set(finished[:-FINISHED_SHOWN])
    width = None if all_jobs else REASON_WIDTH
    rows = [
        (job["job"], job["phase"], f"{job['step']}/{job['steps']}", shortened(job["reason"], width))
        for job in jobs
        if job["job"] not in hidden
    ]
    shown = table(("JOB", "PHASE", "STEP", "REASON"), rows)
    return f"{shown}\n{len(hidden)} older finished jobs: `openrl status --all`" if hidden else shown


async def _asked(paths: Paths, state: MeshState) -> tuple[dict[str, ReplicaRecord], list[dict[str, Any]], str]:
    """Replicas and jobs; if the bus does not answer, neither, and why."""
    if not state.nats_url:
        return {}, [], ""
    try:
        async with connected(paths) as bus:
            return await replicas(bus), [job_summary(record) for record in await jobs(bus)], ""
    except MeshError as error:
        return {}, [], str(error)


def _service(service: ServiceState, replica: ReplicaRecord | None) -> dict[str, Any]:
    alive = replica is not None and replica.pid == service.pid
    return {
        "name": service.name,
        "service": service.service,
        "state": service.condition,
        "pid": service.pid,
        "port": service.port,
        "activity": replica.activity if replica is not None and alive else "",
        "uptime_s": round(time.time() - service.started, 1) if service.started and service.pid else None,
        "restarts": service.restarts,
        "base_model": service.base_model,
        "message": service.message,
    }


def _services(services: list[dict[str, Any]]) -> str:
    rows = [
        (
            service["name"],
            service["state"],
            service["pid"] or "-",
            service["port"] or "-",
            duration(service["uptime_s"]) if service["uptime_s"] is not None else "-",
            service["restarts"],
            service["activity"] or (service["message"] if service["state"] in ("waiting", "failed") else ""),
        )
        for service in services
    ]
    return table(("SERVICE", "STATE", "PID", "PORT", "UP", "RESTARTS", "ACTIVITY"), rows)


def _disk(paths: Paths) -> dict[str, int]:
    if not paths.root.exists():
        return {"free": shutil.disk_usage(paths.root.anchor).free, "bus": 0, "blobs": 0}
    free = shutil.disk_usage(paths.root).free
    return {"free": free, "bus": tree_size(paths.nats), "blobs": tree_size(paths.blobs)}
