"""A service that does nothing, and a mesh of such services: `python -m tests.mesh.stand_in --config FILE`, and
`python -m tests.mesh.stand_in up DATA PORT MODE...`, which is `openrl up` with one of them for each mode.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import typer

from services.local.cli import exit_with
from services.local.config import Paths, ServiceCommand
from services.local.lifecycle import run_commands
from shared.config import ServiceConfig
from shared.errors import UserError
from shared.node import Node
from shared.process import main


class StandInConfig(ServiceConfig, frozen=True, kw_only=True):
    mode: str = "fine"
    """`fine`; `wrong`: its configuration cannot work; `crash`: ends while starting; `stubborn`: never stops by itself;
    `once`: comes up once, and later says that its configuration cannot work."""
    scratch: str = ""
    """`once`: a file to remember by."""


class StandIn:
    base_model = None
    offers = ()

    def __init__(self, config: StandInConfig, node: Node) -> None:
        self._config = config
        self._node = node

    def activity(self) -> str:
        return "standing in"

    async def start(self) -> None:
        mode = self._config.mode
        if mode == "wrong" or (mode == "once" and Path(self._config.scratch).exists()):
            raise UserError("colour 'plaid' is unknown: choose red or blue")
        if mode == "once":
            Path(self._config.scratch).touch()
        if mode == "crash":
            raise RuntimeError("it broke")

    async def stop(self) -> None:
        if self._config.mode == "stubborn":
            await asyncio.Event().wait()


def commands(paths: Paths, *modes: str) -> list[ServiceCommand]:
    argv = (sys.executable, "-m", "tests.mesh.stand_in")
    found = []
    for number, mode in enumerate(modes):
        config = {"mode": mode, "scratch": str(paths.root / f"scratch-{number}")}
        found.append(ServiceCommand(f"stand-in-{number}", "stand_in", argv, config))
    return found


def up_argv(paths: Paths, port: int, *modes: str) -> list[str]:
    return [sys.executable, "-m", "tests.mesh.stand_in", "up", str(paths.root), str(port), *modes]


def up(data: str, port: str, *modes: str) -> None:
    paths = Paths.of(Path(data))
    with exit_with():
        run_commands(paths, commands(paths, *modes), port=int(port), echo=typer.echo)


if __name__ == "__main__":
    if sys.argv[1:2] == ["up"]:
        up(*sys.argv[2:])
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        main("stand_in", StandInConfig, StandIn)
