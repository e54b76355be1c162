"""`openrl demo`: a whole RL job on one machine, from nothing to an adapter that PEFT loads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.local import models
from services.local.client import control, export, read_spec, submit
from services.local.config import Paths, ServiceCommand
from services.local.progress import JobView, evaluation_line
from services.local.supervisor import Supervisor, Tell
from services.local.watch import Show, watch
from shared.bus import Bus
from shared.errors import MeshError, PermanentError, UserError

SPEC = Path(__file__).parents[2] / "examples" / "demo.json"
CANCEL_SECONDS = 3.0

Commands = Callable[[Paths, dict[str, Path]], list[ServiceCommand]]


@dataclass(frozen=True)
class Demo:
    """What to run and where to put the outcome."""

    paths: Paths
    model: str
    spec: Path
    seed: int | None
    """None: the one in the specification."""
    out: Path | None
    """None: ./adapters/<job>."""


def ensure_model(paths: Paths, name: str, tell: Tell) -> Path:
    """The directory of a registered model; the demo model is fetched if need be."""
    known = models.registered(paths)
    return known[name] if name in known else models.add(paths, name, None, tell=tell)


def demo_spec(demo: Demo) -> dict[str, Any]:
    """The job, for the chosen model and seed."""
    spec = read_spec(demo.spec)
    if not isinstance(spec, dict):
        raise UserError(f"{demo.spec} does not describe a job: it must hold a JSON object")
    return spec | {"base_model": demo.model} | ({} if demo.seed is None else {"seed": demo.seed})


async def run_demo(
    demo: Demo, commands: list[ServiceCommand], tell: Tell, showing: Callable[[], AbstractContextManager[Show]]
) -> JobView:
    """Start the mesh, run the job, export its adapter, stop; how it went.

    Raise `PermanentError` if the job does not succeed.
    """
    spec = demo_spec(demo)
    supervisor = Supervisor(demo.paths, commands, port=0, tell=tell)
    async with supervisor.running() as bus:
        job = await submit(bus, spec)
        tell(f"job {job} was submitted: {demo.spec}")
        with showing() as show:
            view = await _watched(bus, job, show)
        if view.phase != "succeeded":
            raise PermanentError(f"job {job} {view.phase}: {view.reason or 'see `openrl logs`'}")
        out = demo.out or Path("adapters") / job
        await export(bus, job, out)
    for line in outcome(view, out, demo.model, models.registered(demo.paths)[demo.model]):
        tell(line)
    return view


def outcome(view: JobView, out: Path, model: str, directory: Path) -> list[str]:
    """What to say at the end."""
    lines = []
    if pair := view.first_and_last:
        lines += ["", *(evaluation_line(evaluation, view.measure) for evaluation in pair)]
    return [
        *lines,
        "",
        f"the adapter, in PEFT's format, is in {out}. To use it:",
        "    from peft import PeftModel",
        "    from transformers import AutoModelForCausalLM",
        f"    base = AutoModelForCausalLM.from_pretrained({str(directory)!r})  # {model}",
        f"    model = PeftModel.from_pretrained(base, {str(out)!r})",
    ]


async def _watched(bus: Bus, job: str, show: Show) -> JobView:
    try:
        return await watch(bus, job, show, alive=lambda: True)
    except asyncio.CancelledError:
        # The mesh goes down with the demo: without this, the job would go on unasked at the next `up`.
        with contextlib.suppress(MeshError, TimeoutError):
            await asyncio.wait_for(control(bus, "cancel", job), CANCEL_SECONDS)
        raise
