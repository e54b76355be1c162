"""Ways to show a job: a live table on a terminal, plain lines in a log, JSON for a program."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.local.printing import accuracy_text
from services.local.progress import JobView, activity_line, phase_text
from services.local.watch import Event

ROWS = 12
"""Newest steps that the live table shows."""
QUIET_SECONDS = 15.0
"""After which plain output says what the services are doing."""


class Lines:
    """A line for everything that happens, which reads well in the log of a build."""

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self._last = time.monotonic()

    def news(self, view: JobView, event: Event | None, lines: Sequence[str]) -> None:
        """See `Show.news`."""
        for line in lines:
            self._say(line)

    def refresh(self, view: JobView) -> None:
        """See `Show.refresh`."""
        if time.monotonic() - self._last >= QUIET_SECONDS and not view.finished:
            self._say(f"  {activity_line(view.replicas)}")

    def _say(self, line: str) -> None:
        self._last = time.monotonic()
        self._echo(line)


class JsonLines:
    """The events as they are, one JSON object a line."""

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo

    def news(self, view: JobView, event: Event | None, lines: Sequence[str]) -> None:
        """See `Show.news`."""
        if event is not None:
            self._echo(msgspec.json.encode(event).decode())

    def refresh(self, view: JobView) -> None:
        """See `Show.refresh`."""


class LiveTable:
    """A table that stays in its place on the terminal. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._live.stop()

    def news(self, view: JobView, event: Event | None, lines: Sequence[str]) -> None:
        """See `Show.news`."""
        self._live.update(picture(view))

    def refresh(self, view: JobView) -> None:
        """See `Show.refresh`."""
        self._live.update(picture(view))


def picture(view: JobView) -> Group:
    """The whole view, for a terminal."""
    heading = Text.assemble(
        ("job ", "dim"), (view.job, "bold"), f" {phase_text(view.phase, view.reason)}, step {view.step}/{view.steps}"
    )
    parts: list[Text | Table] = [heading]
    if view.evaluations:
        accuracies = "  ".join(f"{step}: {accuracy_text(item)}" for step, item in sorted(view.evaluations.items()))
        parts.append(Text(f"held-out {view.measure} by step  {accuracies}"))
    if view.reports:
        parts.append(_steps(view))
    if view.replicas and not view.finished:
        parts.append(_services(view))
    return Group(*parts)


def _steps(view: JobView) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("step", "reward", "held-out", "tok/s", "staleness", "trained", "skipped", "dropped", "loss", "s"):
        table.add_column(heading, justify="right")
    for step in sorted(view.reports)[-ROWS:]:
        report = view.reports[step]
        accuracy = view.evaluations.get(step)
        table.add_row(
            str(step),
            f"{report.reward:.3f}",
            accuracy_text(accuracy) if accuracy else "",
            f"{report.tokens_per_second:.0f}",
            f"{report.staleness:.1f}",
            str(report.trained_groups),
            str(report.skipped_groups),
            str(report.dropped_groups),
            f"{report.loss:+.4f}",
            f"{report.seconds:.1f}",
        )
    return table


def _services(view: JobView) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for replica in view.replicas:
        table.add_row(replica.replica, replica.activity if replica.ready else f"not ready: {replica.activity}")
    return table
