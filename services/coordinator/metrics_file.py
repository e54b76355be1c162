"""A job's metrics as a file of JSON lines, for people and plots: a line for each step and each evaluation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import msgspec

from shared import topology
from shared.contracts.jobs import Evaluation, StepReport

log = logging.getLogger(__name__)

Kind = Literal["step", "evaluation"]


class _Line(msgspec.Struct):
    kind: Kind
    step: int


def path_of(directory: Path, job: str) -> Path:
    """Where a job's metrics are written."""
    return directory / f"{topology.token(job)}.jsonl"


class MetricsFile:
    """Written once for each step, whoever drives the job, and however often it is told. No file stops a job."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: set[tuple[Kind, int]] | None = None

    def append(self, kind: Kind, row: StepReport | Evaluation) -> None:
        """Add a line, unless the file has one of that kind and step."""
        try:
            written = self._lines()
            if (kind, row.step) in written:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode({"kind": kind, **msgspec.to_builtins(row)}) + b"\n")
            written.add((kind, row.step))
        except OSError as error:
            log.warning("metrics cannot be written to %s: %s", self._path, error.strerror)

    def _lines(self) -> set[tuple[Kind, int]]:
        if self._written is None:
            text = self._path.read_bytes() if self._path.exists() else b""
            self._written = {(line.kind, line.step) for line in map(_decoded, text.splitlines()) if line is not None}
        return self._written


def _decoded(line: bytes) -> _Line | None:
    try:
        return msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError:  # cut off by a crash
        return None
