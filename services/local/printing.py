"""Plain tables and times for the command line: the same on a terminal, in a pipe and in a log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from shared.contracts.jobs import Evaluation, JobRecord


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest entry."""
    cells = [[str(cell) for cell in row] for row in [headings, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def as_json(value: Any) -> str:
    """JSON with indentation, for programs and people."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def duration(seconds: float) -> str:
    """Such as `3 s`, `12 min`, `5 h`, `2 d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def shortened(text: str, width: int | None) -> str:
    """One line of at most `width` characters; None: however long it is."""
    line = " ".join(text.split())
    return line if width is None or len(line) <= width else f"{line[: width - 1].rstrip()}…"


def accuracy_text(evaluation: Evaluation) -> str:
    """An accuracy, if there is one."""
    return "not measured" if evaluation.accuracy is None else f"{evaluation.accuracy:.3f}"


def job_summary(record: JobRecord) -> dict[str, Any]:
    """A job in a few fields, as `jobs --json` and `status --json` give it."""
    accuracies = [evaluation.accuracy for evaluation in record.evaluations]
    return {
        "job": record.job,
        "phase": record.phase,
        "step": record.step,
        "steps": record.spec.algorithm.steps,
        "base_model": record.spec.base_model,
        "reward": record.last.reward if record.last else None,
        "accuracy_first": accuracies[0] if accuracies else None,
        "accuracy_last": accuracies[-1] if accuracies else None,
        "reason": record.reason,
        "created": record.created,
        "finished": record.finished,
    }


def jobs_table(records: Sequence[JobRecord]) -> str:
    """Jobs, a row each."""
    rows = []
    for record in records:
        accuracies = [accuracy_text(evaluation) for evaluation in record.evaluations]
        accuracy = " -> ".join([accuracies[0], accuracies[-1]] if len(accuracies) > 1 else accuracies)
        steps = f"{record.step}/{record.spec.algorithm.steps}"
        rows.append((record.job, record.phase, steps, accuracy, record.spec.base_model, record.reason))
    return table(("JOB", "PHASE", "STEP", "HELD-OUT", "MODEL", "REASON"), rows)
