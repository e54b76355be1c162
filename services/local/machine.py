"""What this machine has: ports, disk, and how much of it the bus may use."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
from enum import StrEnum
from pathlib import Path

from shared import topology
from shared.errors import UserError

STORE_SHARE = 0.8
"""Part of the free disk that the bus may fill."""
BUCKET_ROOM = 1 << 30
"""For the key-value buckets, which have no size of their own."""
HIGHEST_PORT = 65535


def check_port(port: int, option: str = "--port") -> None:
    """Raise `UserError` if nobody could listen on this port of the loopback interface. 0 is always fine."""
    if not 0 <= port <= HIGHEST_PORT:
        raise UserError(f"port {port} does not exist: choose one from 1 to {HIGHEST_PORT}, or 0 for any free one")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As nats-server does it; otherwise a port whose last connections are just closing would count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise UserError(
                f"port {port} on 127.0.0.1 {why}: choose another with {option}, or 0 for any free one"
            ) from None


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_device(device: str) -> None:
    """Raise `UserError` if models cannot run there. `auto` and `cpu` are always fine; for others torch is asked."""
    if device in ("auto", "cpu"):
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UserError(f"device {device!r} is unknown: give auto, cpu, cuda, or cuda:1 for the second GPU")
    asked = subprocess.run(
        [sys.executable, "-m", "shared.models.devices", device], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        problem = (asked.stdout or asked.stderr).strip().splitlines() or [f"device {device!r} cannot be used"]
        raise UserError(problem[-1])


class SamplerEngine(StrEnum):
    """What samplers generate with."""

    TORCH = "torch"
    VLLM = "vllm"


def check_engine(engine: SamplerEngine) -> None:
    """Raise `UserError` if samplers cannot use it here."""
    if engine is SamplerEngine.VLLM and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "sampler engine vllm: vLLM is not installed beside this `openrl`. `make vllm` makes .venv-vllm, for CPUs, "
            "whose `openrl` has it; on a GPU, pip install 'openrl-mesh[vllm]'; or use --sampler-engine torch"
        )


def streams_size() -> int:
    """Bytes that all streams together may hold. The server reserves them, and makes no stream that does not fit."""
    return sum(stream.max_bytes for stream in topology.STREAMS) + BUCKET_ROOM


def store_limit(directory: Path) -> int:
    """Bytes that the bus may store below `directory`: most of the disk, and never less than the streams need."""
    free = shutil.disk_usage(directory).free + tree_size(directory)
    return max(streams_size(), int(free * STORE_SHARE))


def tree_size(directory: Path) -> int:
    """Bytes of all files below a directory. Files that vanish meanwhile do not count."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                total += path.stat().st_size
    return total


def readable(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
