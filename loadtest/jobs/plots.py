"""Draws a run of `loadtest.jobs`: jobs, replicas, GPUs and throughput over time, one below the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.jobs.series import Phase, Points

Found = Mapping[str, Mapping[str, Points]]


def draw(found: Found, phases: Sequence[Phase], path: Path) -> None:
    """Write the picture. Needs matplotlib."""
    import matplotlib as mpl  # noqa: PLC0415 - only for whoever draws

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    panels: list[tuple[str, list[tuple[str, str]]]] = [
        ("jobs", [("jobs", "jobs running")]),
        ("replicas", [("replicas", "{}")]),
        ("sequences", [("sequences", "running"), ("queue", "queued")]),
        ("busy", [("sampler_duty", "samplers"), ("trainer_duty", "trainers"), ("gpu", "GPU {}")]),
        ("tokens/s", [("sampled", "sampled"), ("trained", "trained")]),
    ]
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(10, 11), constrained_layout=True)
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for name, label in lines:
            for value, points in sorted(found[name].items()):
                _line(axis, points, label.format(value), phases[0].begin, steps=name in ("jobs", "replicas"))
        for phase in phases:
            axis.axvspan(phase.begin - phases[0].begin, phase.end - phases[0].begin, color="0.93", zorder=0)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.grid(color="0.85", linewidth=0.5)
        axis.legend(loc="upper right", fontsize="small")
    axes[-1].set_xlabel("seconds; grey: jobs run")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(axis: Any, points: Points, label: str, begin: float, *, steps: bool) -> None:
    times, values = [at - begin for at, _ in points], [value for _, value in points]
    axis.plot(times, values, label=label, drawstyle="steps-post" if steps else "default", linewidth=1.4)
