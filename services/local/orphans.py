"""Ends what a supervisor that was killed left behind, so that its data directory can be used again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Sequence

import psutil

from services.local.processes import kill_group
from services.local.state import ServiceState

PATIENCE = 3.0
POLL_SECONDS = 0.02


def end_orphans(services: Iterable[ServiceState], tell: Callable[[str], None]) -> None:
    """End those processes that still run and are certainly ours. Blocks for a few seconds at most."""
    left = [service for service in services if is_ours(service)]
    if not left:
        return
    tell(f"ending {len(left)} processes of a supervisor that was killed: {', '.join(item.name for item in left)}")
    for service in left:
        _signal(service)
    if not _gone(left, PATIENCE):
        for service in left:
            if is_ours(service):
                kill_group(service.pid or 0)
        _gone(left, PATIENCE)


def is_ours(service: ServiceState) -> bool:
    """Whether the recorded process id is still that service, and not another process that got the same number."""
    if not service.pid or not service.marker:
        return False
    try:
        process = psutil.Process(service.pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # ended; nobody has asked for its exit code
            return False
        return any(service.marker == argument for argument in process.cmdline())
    except psutil.Error:
        return False


def _signal(service: ServiceState) -> None:
    try:
        psutil.Process(service.pid).send_signal(signal.SIGTERM)
    except psutil.Error:
        return


def _gone(services: Sequence[ServiceState], patience: float) -> bool:
    give_up = time.monotonic() + patience
    while any(is_ours(service) for service in services):
        if time.monotonic() > give_up:
            return False
        time.sleep(POLL_SECONDS)
    return True
