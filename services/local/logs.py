"""Reads the services' logs: one stream in the order of time out of many files of JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.local.config import Paths
from shared.errors import UserError

ROTATE_BYTES = 32 << 20
TAIL_BYTES = 2 << 20
"""How much of the end of a file is read for its last lines."""
FOLLOW_SECONDS = 0.25
NATS = "nats-server"
_NATS_LINE = re.compile(r"^\[\d+\] (\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d+) \[(\w+)\] (.*)$")
_NATS_LEVELS = {"INF": "info", "WRN": "warning", "ERR": "error", "FTL": "error", "DBG": "debug", "TRC": "debug"}
_PROMETHEUS_FIELDS = {"ts": "time", "msg": "message", "err": "error"}
TRACEBACK = "Traceback (most recent call last):"
_MANY = ("sampler", "trainer")
"""Services of which there is a replica for each model, called by it."""
_SHOWN = {"time", "level", "service", "replica", "logger", "message", "error"}


@dataclass(frozen=True)
class Line:
    """One entry of a log."""

    when: float
    """Seconds since 1970. An entry without a time has that of the one before it."""
    source: str
    """Name of the service's replica."""
    fields: dict[str, Any] = field(default_factory=dict)
    bare: bool = False
    """It was not written by a logger, but printed."""

    @property
    def json(self) -> str:
        """As one JSON object."""
        return json.dumps(self.fields)

    @property
    def text(self) -> str:
        """For reading: local time, level, source, message, ids; below it the traceback, if there is one."""
        clock = datetime.fromtimestamp(self.when).astimezone().strftime("%H:%M:%S.%f")[:-3]
        ids = "".join(f"  {key}={value}" for key, value in self.fields.items() if key not in _SHOWN)
        text = f"{clock} {self.fields.get('level', ''):<7} {self.source:<12} {self.fields.get('message', '')}{ids}"
        return f"{text}\n{str(self.fields['error']).rstrip()}" if self.fields.get("error") else text


def parse(raw: str, source: str, previous: float = 0.0) -> Line:
    """Read a line: JSON as services write it, nats-server's own form, or bare text (a crash before logging began)."""
    with contextlib.suppress(ValueError):
        fields = json.loads(raw)
        if isinstance(fields, dict):
            fields = _our_names(fields)
            return Line(_time(fields, previous), source, fields)
    when, level, message, bare = previous, "info", raw.rstrip(), True
    if found := _NATS_LINE.match(raw):
        # It writes local time without a zone.
        when = datetime.strptime(found[1], "%Y/%m/%d %H:%M:%S.%f").astimezone().timestamp()
        level, message, bare = _NATS_LEVELS.get(found[2], "info"), found[3], False
    stamp = _stamp(when)
    fields = {"time": stamp, "level": level, "service": service_of(source), "replica": source, "message": message}
    if bare and message.startswith(TRACEBACK):
        fields |= {"level": "error", "message": message.splitlines()[-1], "error": message}
    return Line(when, source, fields, bare)


def _our_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Prometheus names them otherwise."""
    return {_PROMETHEUS_FIELDS.get(name, name): value for name, value in fields.items()}


def service_of(replica: str) -> str:
    """The service of a replica that this command started, or the name itself."""
    return next((name for name in _MANY if replica.startswith(f"{name}-")), replica)


def _joined(raw: Iterable[str]) -> list[str]:
    """Lines that belong together made one entry: a traceback, up to and including the error that it ends with."""
    found: list[str] = []
    open_ = False
    for line in raw:
        if open_:
            found[-1] += f"\n{line}"
            open_ = line.startswith((" ", "\t")) or not line
        else:
            found.append(line)
            open_ = line.startswith(TRACEBACK)
    return found


def files(paths: Paths, service: str | None) -> dict[str, Path]:
    """Log files by source. `service` is a replica's name or a service's. Raise `UserError` if there is none such."""
    found = {path.stem: path for path in sorted(paths.logs.glob("*.log"))}
    if (nats := paths.nats / "nats.log").exists():
        found[NATS] = nats
    if service is None:
        return found
    chosen = {name: path for name, path in found.items() if name == service or name.startswith(f"{service}-")}
    if not chosen:
        raise UserError(f"there is no log of {service!r} in {paths.root}: there are {', '.join(found) or 'none'}")
    return chosen


def last_lines(sources: dict[str, Path], count: int) -> list[Line]:
    """The newest `count` entries of all files together, oldest first."""
    lines: list[Line] = []
    for source, path in sources.items():
        lines += _parse_all(_tail(path, count), source, path.stat().st_mtime)
    lines.sort(key=lambda line: line.when)
    return lines[-count:] if count else []


def follow(paths: Paths, service: str | None) -> Iterator[list[Line]]:
    """New entries, a batch (often empty) every quarter of a second, for ever. Services that start later are seen."""
    places = {source: path.stat().st_size for source, path in files(paths, service).items()}
    while True:
        batch: list[Line] = []
        for source, path in files(paths, service).items():
            text, places[source] = _new_text(path, places.get(source, 0))
            batch += _parse_all(text.splitlines(), source, time.time())
        yield sorted(batch, key=lambda line: line.when)
        time.sleep(FOLLOW_SECONDS)


def last_error(path: Path, start: int = 0) -> str:
    """The message of the last error that was written behind byte `start`; else the last bare text; else ""."""
    if not path.exists():
        return ""
    size = path.stat().st_size
    raw = _read(path, max(start if start <= size else 0, size - TAIL_BYTES))
    lines = _parse_all(raw.decode(errors="replace").splitlines(), "")
    errors = [line for line in lines if line.fields.get("level") in ("error", "critical")]
    bare = [line for line in lines if line.bare]
    if not errors and not bare:
        return ""
    last = (errors or bare)[-1]
    cause = str(last.fields.get("error", "")).strip().splitlines()
    message = str(last.fields.get("message", ""))
    return f"{message}: {cause[-1]}" if cause and cause[-1] != message else message


def rotate(path: Path, limit: int = ROTATE_BYTES) -> None:
    """Keep a log small: what is over `limit` goes to `NAME.log.1`, over the one before.

    The writer appends, so it goes on at the new end; lines it writes during the copy may be lost.
    """
    if path.exists() and path.stat().st_size > limit:
        shutil.copyfile(path, path.with_name(path.name + ".1"))
        os.truncate(path, 0)


def _time(fields: dict[str, Any], previous: float) -> float:
    try:
        return datetime.fromisoformat(str(fields.get("time"))).timestamp()
    except ValueError:
        return previous


def _parse_all(raw: Sequence[str], source: str, otherwise: float = 0.0) -> list[Line]:
    """Read lines. Those that say no time have that of the one before, or the first after, or else `otherwise`."""
    lines: list[Line] = []
    for text in _joined(raw):
        if text.strip():
            lines.append(parse(text, source, lines[-1].when if lines else 0.0))
    first = next((line.when for line in lines if line.when), otherwise)
    return [line if line.when else _at(line, first) for line in lines]


def _at(line: Line, when: float) -> Line:
    return replace(line, when=when, fields=line.fields | {"time": _stamp(when)})


def _stamp(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")


def _tail(path: Path, count: int) -> list[str]:
    raw = _read(path, max(0, path.stat().st_size - TAIL_BYTES))
    return raw.decode(errors="replace").splitlines()[-count:] if count else []


def _read(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


def _new_text(path: Path, place: int) -> tuple[str, int]:
    """What was written behind `place` in whole lines, and the new place."""
    if path.stat().st_size < place:  # it was rotated
        place = 0
    raw = _read(path, place)
    whole = raw[: raw.rfind(b"\n") + 1]
    return whole.decode(errors="replace"), place + len(whole)
