"""The commands about jobs, and what the command line's two files share."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from services.local import client
from services.local.config import Paths
from services.local.lifecycle import until_signal
from services.local.printing import as_json, job_summary, jobs_table
from services.local.progress import JobView, measure, phase_text
from services.local.show import JsonLines, Lines, LiveTable
from services.local.state import lock_holder
from services.local.watch import Show, watch
from shared.contracts.jobs import JobRecord
from shared.errors import UserError

INTERRUPTED = 130

Data = Annotated[Path, typer.Option("--data", envvar="OPENRL_DATA", help="The data directory.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
JobId = Annotated[str, typer.Argument(help="As `openrl jobs` shows it.")]


def paths_of(data: Path) -> Paths:
    """The layout of the data directory that a command names."""
    return Paths.of(data)


@contextlib.contextmanager
def showing(*, as_json_: bool = False) -> Iterator[Show]:
    """A live table on a terminal, else lines."""
    console = Console()
    if as_json_:
        yield JsonLines(typer.echo)
    elif console.is_terminal:
        with LiveTable(console) as live:
            yield live
    else:
        yield Lines(typer.echo)


def submit(
    file: Annotated[str, typer.Argument(help="A job in JSON, or in TOML if it is called .toml. -: standard input.")],
    *,
    data: Data = Path(".openrl"),
    and_watch: Annotated[bool, typer.Option("--watch", help="Go on as `openrl watch`.")] = False,
    as_json_: Json = False,
) -> None:
    """Ask for a job and print its id. Exit code 2 with every error if the job is refused."""
    paths = paths_of(data)
    spec = client.parse_spec(sys.stdin.read(), "standard input") if file == "-" else client.read_spec(Path(file))

    async def ask() -> str:
        async with client.connected(paths) as bus:
            return await client.submit(bus, spec)

    try:
        name = asyncio.run(ask())
    except client.Refused as refused:
        if not as_json_:
            raise
        typer.echo(as_json({"job": None, "errors": refused.errors}))
        sys.exit(2)
    typer.echo(as_json({"job": name, "errors": []}) if as_json_ else f"job {name}")
    if and_watch:
        _watch(paths, name, as_json_=as_json_)


def jobs(*, data: Data = Path(".openrl"), as_json_: Json = False) -> None:
    """Show all jobs, oldest first."""

    async def ask() -> list[JobRecord]:
        async with client.connected(paths_of(data)) as bus:
            return await client.jobs(bus)

    records = asyncio.run(ask())
    if as_json_:
        typer.echo(as_json([job_summary(record) for record in records]))
    else:
        typer.echo(jobs_table(records) if records else "no jobs yet: `openrl submit FILE` asks for one")


class ShowByDefault(TyperGroup):
    """`job ID` is `job show ID`: the id of a job ends in a number, so it is no command's name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See click. The first argument that is neither a command nor an option is taken for a job."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["show", *args]
        return super().resolve_command(ctx, args)


job_app = typer.Typer(cls=ShowByDefault, no_args_is_help=True)


@job_app.command("show")
def show_job(name: JobId, *, data: Data = Path(".openrl"), as_json_: Json = False) -> None:
    """Show one job; with --json its whole record."""

    async def ask() -> JobRecord:
        async with client.connected(paths_of(data)) as bus:
            return await client.job(bus, name)

    record = asyncio.run(ask())
    if as_json_:
        typer.echo(as_json(record))
        return
    view = JobView(record.job, measure=measure(record.spec))
    lines = view.recorded(record)
    typer.echo(
        "\n".join([f"job {record.job} {phase_text(record.phase, record.reason)}", *_details(record), *lines[:-1]])
    )


@job_app.command("delete")
def delete_jobs(
    names: Annotated[list[str], typer.Argument(help="Finished jobs, as `openrl jobs` shows them.")],
    *,
    data: Data = Path(".openrl"),
) -> None:
    """Delete finished jobs: records, metrics, policies, checkpoints, snapshots. Exported adapters stay."""

    async def ask() -> int:
        refused = 0
        async with client.connected(paths_of(data)) as bus:
            for name in names:
                try:
                    await client.control(bus, "delete", name)
                    typer.echo(f"job {name} is deleted")
                except UserError as error:
                    refused += 1
                    typer.echo(f"error: {error}", err=True)
        return refused

    if asyncio.run(ask()):
        sys.exit(2)


def watch_command(name: JobId, *, data: Data = Path(".openrl"), as_json_: Json = False) -> None:
    """Show how a job goes, from its beginning. Exit code 0 if it succeeds, 1 if not. Ctrl-C leaves the job alone."""
    _watch(paths_of(data), name, as_json_=as_json_)


def cancel(name: JobId, *, data: Data = Path(".openrl")) -> None:
    """End a job for good."""
    _control(paths_of(data), "cancel", name)


def pause(name: JobId, *, data: Data = Path(".openrl")) -> None:
    """Let a job rest until it is resumed."""
    _control(paths_of(data), "pause", name)


def resume(name: JobId, *, data: Data = Path(".openrl")) -> None:
    """Let a paused job go on."""
    _control(paths_of(data), "resume", name)


def export(
    name: JobId,
    directory: Annotated[Path, typer.Argument(help="A new or empty directory.")],
    *,
    data: Data = Path(".openrl"),
) -> None:
    """Copy a job's newest policy, as files that PEFT loads."""

    async def copy() -> str:
        async with client.connected(paths_of(data)) as bus:
            return str((await client.export(bus, name, directory)).policy)

    typer.echo(f"policy {asyncio.run(copy())} is in {directory}")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (submit, jobs, cancel, pause, resume, export):
        app.command()(command)
    app.add_typer(job_app, name="job", help="Show one job (`job ID`), or delete finished ones (`job delete ID...`).")
    app.command("watch")(watch_command)


def _control(paths: Paths, action: client.Action, name: str) -> None:
    async def ask() -> None:
        async with client.connected(paths) as bus:
            await client.control(bus, action, name)

    asyncio.run(ask())
    done = {"cancel": "will be cancelled", "pause": "will pause", "resume": "will go on"}
    typer.echo(f"job {name} {done[action]}")


def _watch(paths: Paths, name: str, *, as_json_: bool) -> None:
    async def follow() -> JobView:
        async with client.connected(paths) as bus:
            with showing(as_json_=as_json_) as show:
                return await watch(bus, name, show, alive=lambda: lock_holder(paths) is not None)

    view = until_signal(follow())
    if view is None:
        sys.exit(INTERRUPTED)
    if view.phase != "succeeded":  # what was shown ends with the reason
        sys.exit(1)


def _details(record: JobRecord) -> list[str]:
    spec = record.spec
    rows: list[tuple[str, Any]] = [
        ("model", spec.base_model),
        ("environment", spec.environment.name),
        ("reward", spec.reward.name),
        ("step", f"{record.step} of {spec.algorithm.steps}"),
        ("policy", record.policy or "still the base model"),
        ("adapter", record.adapter or "none yet"),
        ("groups", f"{record.skipped_groups} skipped, {record.dropped_groups} dropped, {record.failed_groups} failed"),
    ]
    return [f"  {name:<12} {value}" for name, value in rows]
