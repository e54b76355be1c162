"""Prometheus beside the mesh of one machine: loopback only, its data below the mesh's, its targets from the bus.

Services listen on another port at each start, and replicas come and go, so the supervisor writes a list of targets that
Prometheus watches (`file_sd`). A target's `instance` is the replica's name, so its series go on after a restart.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import aiohttp

from services.local.config import Paths, ServiceCommand, service_command
from services.local.logs import rotate
from services.local.machine import check_port, free_port
from services.local.processes import CHILD_ENVIRONMENT, Process, Program, guarded
from services.local.state import replace_file
from shared.contracts.replicas import ReplicaRecord
from shared.errors import UserError

NAME = "prometheus"
DEFAULT_PORT = 9090
SCRAPE_SECONDS = 2
"""A jump of load is to be decided on within six seconds; on one machine a scrape costs little."""
KEEP_DAYS = 15
KEEP_SIZE = "2GB"
START_SECONDS = 30.0
"""After a crash it reads its write-ahead log again."""
POLL_SECONDS = 0.05
HTTP_OK = 200
EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 - recognised, not listened on


class Prometheus:
    """The Prometheus of one mesh."""

    def __init__(self, paths: Paths, *, port: int = DEFAULT_PORT) -> None:
        """`port` on 127.0.0.1, 0 for a free one. Raise `UserError` if there is no Prometheus, or the port is taken."""
        self._binary = find_binary(NAME)
        check_port(port, "--prometheus-port")
        self.port = port or free_port()
        self._directory = paths.root / NAME
        self._log = paths.log(NAME)
        self._config = self._directory / "prometheus.yml"
        self._targets_file = self._directory / "targets.json"
        self._written = b""

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def program(self) -> Program:
        """How the supervisor keeps it running."""
        return Program(
            name=NAME, service=NAME, launch=self.launch, log=self._log, marker=str(self._config), port=self.port
        )

    async def launch(self) -> Process:
        """Start it, and return when it answers. Raise `UserError` if it does not come up."""
        self._directory.mkdir(parents=True, exist_ok=True)
        replace_file(self._config, json.dumps(self._settings(), indent=2).encode())
        if not self._targets_file.exists():
            replace_file(self._targets_file, b"[]")
        rotate(self._log)
        with self._log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *guarded(self._command()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=CHILD_ENVIRONMENT,  # of the user's, nothing concerns it
            )
        try:
            await self._ready(process)
        except BaseException:
            if process.returncode is None:
                process.kill()
            await process.wait()
            raise
        return process

    def show(self, replicas: Iterable[ReplicaRecord]) -> None:
        """Scrape these from now on."""
        content = json.dumps([_target(each) for each in sorted(replicas, key=lambda each: each.replica)], indent=2)
        if self._directory.exists() and content.encode() != self._written:
            self._written = content.encode()
            replace_file(self._targets_file, self._written)

    def _command(self) -> list[str]:
        return [
            self._binary,
            f"--config.file={self._config}",
            f"--storage.tsdb.path={self._directory / 'data'}",
            f"--storage.tsdb.retention.time={KEEP_DAYS}d",
            f"--storage.tsdb.retention.size={KEEP_SIZE}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.format=json",
        ]

    def _settings(self) -> dict[str, Any]:
        """Its configuration, written as JSON: all JSON is YAML, and nothing needs quoting by hand."""
        seconds = f"{SCRAPE_SECONDS}s"
        itself = {"targets": [f"127.0.0.1:{self.port}"], "labels": {"service": NAME, "instance": NAME}}
        return {
            "global": {"scrape_interval": seconds, "scrape_timeout": seconds, "evaluation_interval": seconds},
            "rule_files": [str(rules) for rules in rule_files()],
            "scrape_configs": [
                {
                    "job_name": "openrl",
                    "file_sd_configs": [{"files": [str(self._targets_file)], "refresh_interval": "10s"}],
                },
                {"job_name": NAME, "static_configs": [itself]},
            ],
        }

    async def _ready(self, process: Process) -> None:
        give_up = asyncio.get_running_loop().time() + START_SECONDS
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1)) as http:
            while process.returncode is None:
                if await _answers(http, f"{self.url}/-/ready"):
                    return
                if asyncio.get_running_loop().time() > give_up:
                    raise UserError(f"{NAME} did not come up in {START_SECONDS:.0f} s; see {self._log}")
                await asyncio.sleep(POLL_SECONDS)
        raise UserError(f"{NAME} ended at once; see {self._log}")


def find_binary(name: str) -> str:
    """Path of `prometheus` or `promtool`: beside this Python, else on the PATH. Raise `UserError` if there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise UserError(
            f"{name} is not installed: `apt-get install prometheus` on Debian and Ubuntu (or `make prometheus` in a "
            "checkout, for this environment alone), `brew install prometheus` on macOS; or leave --prometheus out"
        )
    return found


def rule_files() -> list[Path]:
    """The rules that are installed with us."""
    package = resources.files("dashboards")
    return [Path(str(package / name)) for name in ("rules.yml", "alerts.yml")]


def gpu_commands() -> list[ServiceCommand]:
    """The exporter of GPU metrics, where there may be a GPU. It does no harm where there is none after all."""
    if not Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None:
        return []
    return [service_command("gpu_exporter", "gpu-exporter")]


def _target(record: ReplicaRecord) -> dict[str, Any]:
    host = "127.0.0.1" if record.host in EVERYWHERE else record.host
    host = f"[{host}]" if ":" in host else host
    labels = {"service": record.service, "instance": record.replica}
    return {"targets": [f"{host}:{record.metrics_port}"], "labels": labels}


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url) as answer:
            return answer.status == HTTP_OK
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
