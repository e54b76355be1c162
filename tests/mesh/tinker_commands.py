"""Runs commands of the `tinker` command line, each in a process of its own, forked from one which has imported it.

Importing the client takes seconds, since it imports torch. As a program: reads commands as lines of JSON, and writes
for each a line with what came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any


class Commands:
    """The process that runs them."""

    def __init__(self, process: asyncio.subprocess.Process, environment: dict[str, str]) -> None:
        self._process = process
        self._environment = environment

    async def run(self, *arguments: str, stdin: str = "", fails: bool = False, key: str = "") -> str:
        """What a command prints to its standard output, or if it `fails`, as it then must, to its standard error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"argv": arguments, "stdin": stdin, "env": self._environment | ({"TINKER_API_KEY": key} if key else {})}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        done = json.loads(await self._process.stdout.readline())
        assert (done["status"] != 0) == fails, f"{arguments}: {done}"
        return str(done["errors" if fails else "output"])

    async def json(self, *arguments: str, key: str = "") -> Any:
        """What a command prints as JSON."""
        return json.loads(await self.run("--format", "json", *arguments, key=key))


@contextlib.asynccontextmanager
async def tinker_commands(home: Path, **environment: str) -> AsyncIterator[Commands]:
    """Commands in a home of their own."""
    home.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24
    )
    try:
        yield Commands(process, {"HOME": str(home), **environment})
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def main() -> None:
    import tinker  # noqa: F401 - what takes long
    from tinker.cli.__main__ import main as command  # type: ignore[attr-defined,unused-ignore]

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory)
            (place / "stdin").write_text(asked["stdin"])
            child = os.fork()
            if child == 0:
                _become(place, asked)
                os._exit(_status(command))
            _, status = os.waitpid(child, 0)
            told = {"status": status, "output": (place / "1").read_text(), "errors": (place / "2").read_text()}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def _status(command: Callable[[], None]) -> int:
    """What a process would end with, without what belongs to the process that it was forked from."""
    status = 0
    try:
        command()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _become(place: Path, asked: dict[str, Any]) -> None:
    os.dup2(os.open(place / "stdin", os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(place / str(number), os.O_WRONLY | os.O_CREAT), number)
    for name in [name for name in os.environ if name.startswith("TINKER")]:
        del os.environ[name]
    os.environ.update(asked["env"])
    os.chdir(os.environ["HOME"])
    sys.stdin = os.fdopen(0)
    sys.argv = ["tinker", *asked["argv"]]


if __name__ == "__main__":
    main()
