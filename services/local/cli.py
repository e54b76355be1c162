"""The `openrl` command line: the commands about the mesh and its models. It only parses and prints.

Exit codes: 0; 1 for a failure of ours, or what a command's help says; 2 for something that the user can mend, with
one line that says how; 130 after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from services.local import aliases, autoscale, job_commands, logs, models, prometheus, status
from services.local import doctor as doctor_checks
from services.local.config import DEFAULT_PORT, GATEWAY_PORT, mesh_commands
from services.local.demo import SPEC, Demo, ensure_model, run_demo
from services.local.job_commands import Data, Json, paths_of, showing
from services.local.key_commands import key_app
from services.local.lifecycle import run_detached, run_up, take_down, told_and_logged, until_signal
from services.local.machine import SamplerEngine, check_device, check_engine
from services.local.printing import as_json, table
from services.local.up import Up
from shared.errors import MeshError, UserError

USER_ERROR = 2
INTERRUPTED = 130
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""Whatever is wrong with options and arguments; typer exports only this one kind of it."""

app = typer.Typer(
    help="Runs RL post-training on one machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="The models that the mesh can serve.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(key_app, name="key")

Port = Annotated[int, typer.Option("--port", help="Where the bus listens on 127.0.0.1. 0: any free port.")]
GatewayPort = Annotated[
    int | None,
    typer.Option("--gateway-port", min=0, help=f"Where clients connect. 0: any free port. Default: {GATEWAY_PORT}."),
]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="A registered model to serve; may be given again. Default: all.")
]
Device = Annotated[str, typer.Option("--device", help="Where models run: auto, cpu, cuda, cuda:1, ...")]
Engine = Annotated[SamplerEngine, typer.Option("--sampler-engine", help="What generates; vllm must be installed.")]
Detach = Annotated[bool, typer.Option("--detach", help="Stay in the background; return when the mesh is ready.")]


def main() -> None:
    """Run the command line. Does not return."""
    logging.basicConfig(level="WARNING", format="%(message)s")
    logging.getLogger("shared.bus").setLevel("ERROR")  # its first complaint about a server comes as our error as well
    with exit_with():
        sys.exit(app(standalone_mode=False))


@contextlib.contextmanager
def exit_with() -> Iterator[None]:
    """Turn errors into a line on standard error and an exit code."""
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(USER_ERROR)
    except MeshError as error:
        typer.echo(f"failed: {error}", err=True)
        sys.exit(1)
    except USAGE_ERROR as error:
        message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
        if message:
            path = getattr(getattr(error, "ctx", None), "command_path", "openrl")
            typer.echo(f"error: {' '.join(message.split())} (`{path} --help` shows what there is)", err=True)
        sys.exit(USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)


@app.command()
def up(
    *,
    data: Data = Path(".openrl"),
    model: Models = None,
    port: Port = DEFAULT_PORT,
    gateway_port: GatewayPort = None,
    device: Device = "auto",
    sampler_engine: Engine = SamplerEngine.TORCH,
    detach: Detach = False,
    with_prometheus: Annotated[
        bool, typer.Option("--prometheus", help="Run Prometheus too, with our rules; GPU metrics where there is one.")
    ] = False,
    prometheus_port: Annotated[
        int, typer.Option(help="Where it answers on 127.0.0.1. 0: any free port.")
    ] = prometheus.DEFAULT_PORT,
    with_autoscaler: Annotated[
        bool,
        typer.Option("--autoscale", help="Start and stop samplers and trainers by load; with --prometheus."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --autoscale: plan, but start nothing.")] = False,
) -> None:
    """Start the whole mesh and keep it running until Ctrl-C or `openrl down`. Unfinished jobs go on."""
    paths = paths_of(data)
    check_device(device)
    check_engine(sampler_engine)
    if dry_run and not with_autoscaler:
        raise UserError("--dry-run says what the autoscaler would do: give --autoscale with it")
    wish = Up(
        paths=paths,
        models=models.chosen(paths, model or []),
        named=tuple(model or ()),
        port=port,
        # Whoever leaves the bus's port open has several meshes.
        gateway_port=(GATEWAY_PORT if port else 0) if gateway_port is None else gateway_port,
        device=device,
        engine=sampler_engine,
        prometheus_port=prometheus_port if with_prometheus or with_autoscaler else None,
        autoscale="no" if not with_autoscaler else "dry-run" if dry_run else "yes",
    )
    if detach:
        sys.exit(run_detached(paths, wish.argv(), echo=typer.echo))
    run_up(wish, echo=typer.echo)


@app.command()
def down(*, data: Data = Path(".openrl")) -> None:
    """Stop the mesh. Its jobs are kept, and go on at the next `openrl up`."""
    take_down(paths_of(data), echo=typer.echo)


@app.command("plan")
def plan_command(
    *,
    data: Data = Path(".openrl"),
    explain: Annotated[bool, typer.Option("--explain", help="Also show what was measured.")] = False,
    as_json_: Json = False,
) -> None:
    """Show which replica is on which GPU, what the autoscaler does next, and why."""
    found = asyncio.run(autoscale.newest(paths_of(data)))
    typer.echo(as_json(found) if as_json_ else autoscale.text(found, time.time(), explain=explain))


@app.command("status")
def status_command(
    *,
    data: Data = Path(".openrl"),
    all_jobs: Annotated[bool, typer.Option("--all", help="All jobs, with their whole reasons.")] = False,
    as_json_: Json = False,
) -> None:
    """Show services, jobs and disk. Exit code 1 unless a mesh is running and every service is ready."""
    answer = asyncio.run(status.status(paths_of(data)))
    typer.echo(as_json(answer) if as_json_ else status.text(answer, all_jobs=all_jobs))
    if not status.all_ready(answer):
        sys.exit(1)


@app.command()
def doctor(*, data: Data = Path(".openrl"), port: Port = DEFAULT_PORT, as_json_: Json = False) -> None:
    """Check this machine and say how to mend what is missing. Exit code 1 if something essential is."""
    checks = doctor_checks.examine(paths_of(data), port)
    failed = [check for check in checks if not check.ok and check.essential]
    if as_json_:
        typer.echo(as_json({"ok": not failed, "checks": checks}))
    else:
        marks = {(True, True): "ok", (True, False): "ok", (False, True): "missing", (False, False): "optional"}
        rows = [
            (marks[check.ok, check.essential], check.name, check.found + ("" if check.ok else f"; {check.mend}"))
            for check in checks
        ]
        typer.echo(table(("", "CHECK", "FOUND"), rows))
    if failed:
        sys.exit(1)


@app.command("logs")
def logs_command(
    service: Annotated[str | None, typer.Argument(help="A service or replica, nats-server or supervisor.")] = None,
    *,
    data: Data = Path(".openrl"),
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new entries.")] = False,
    count: Annotated[int, typer.Option("-n", min=0, help="Newest entries to begin with.")] = 100,
    as_json_: Json = False,
) -> None:
    """Show the logs of all services in the order of time."""
    paths = paths_of(data)
    shown: Callable[[logs.Line], str] = (lambda line: line.json) if as_json_ else (lambda line: line.text)
    for line in logs.last_lines(logs.files(paths, service), count):
        typer.echo(shown(line))
    for batch in logs.follow(paths, service) if follow else ():
        for line in batch:
            typer.echo(shown(line))


@app.command()
def demo(
    *,
    data: Data = Path(".openrl"),
    out: Annotated[Path | None, typer.Option(help="Where the adapter goes. Default: ./adapters/JOB.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the one in the specification.")] = None,
    model: Annotated[
        str, typer.Option(help="Model to train; the demo's own is fetched if need be.")
    ] = models.DEMO_MODEL,
    spec: Annotated[Path, typer.Option(help="The job.")] = SPEC,
    device: Device = "auto",
    sampler_engine: Engine = SamplerEngine.TORCH,
) -> None:
    """Train a small model from start to end: mesh up, job, evaluation, adapter in PEFT format, mesh down."""
    paths = paths_of(data)
    check_device(device)
    check_engine(sampler_engine)
    paths.make()
    tell = told_and_logged(paths, typer.echo)
    commands = mesh_commands(paths, {model: ensure_model(paths, model, tell)}, device=device, engine=sampler_engine)
    plan = Demo(paths=paths, model=model, spec=spec, seed=seed, out=out)
    if until_signal(run_demo(plan, commands, tell, showing)) is None:
        sys.exit(INTERRUPTED)


@model_app.command("add")
def model_add(
    name: Annotated[str, typer.Argument(help="How jobs will call it.")],
    source: Annotated[str | None, typer.Argument(help="A model directory, or a hub id such as org/model.")] = None,
    *,
    data: Data = Path(".openrl"),
) -> None:
    """Register a model. The demo's, smollm2-135m-instruct, needs no source: it is fetched."""
    directory = models.add(paths_of(data), name, source, tell=typer.echo)
    typer.echo(f"model {name} is registered: {directory}")


@model_app.command("list")
def model_list(*, data: Data = Path(".openrl"), as_json_: Json = False) -> None:
    """Show the registered models."""
    known = models.registered(paths_of(data))
    if as_json_:
        typer.echo(as_json({name: str(directory) for name, directory in known.items()}))
    elif known:
        typer.echo(table(("MODEL", "DIRECTORY"), list(known.items())))
    else:
        typer.echo(f"no models are registered: add one with `openrl model add {models.DEMO_MODEL}`")


@model_app.command("remove")
def model_remove(name: str, *, data: Data = Path(".openrl")) -> None:
    """Forget a model. Files that were fetched are deleted; a directory of your own stays as it is."""
    paths = paths_of(data)
    deleted = models.remove(paths, name)
    typer.echo(f"model {name} is no longer registered" + (f"; {deleted} was deleted" if deleted else ""))
    if gone := aliases.forget_model(paths, name):
        typer.echo(f"nor are its aliases: {', '.join(gone)}")


@model_app.command("alias")
def model_alias(
    name: Annotated[str | None, typer.Argument(help="The other name; none: show all.")] = None,
    target: Annotated[str | None, typer.Argument(help="A registered model.")] = None,
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Forget this alias.")] = False,
    data: Data = Path(".openrl"),
    as_json_: Json = False,
) -> None:
    """Give a model another name, for clients that know only names of their own. A running mesh knows it at once."""
    paths = paths_of(data)
    if name is None:
        _show_aliases(aliases.registered(paths), as_json_=as_json_)
        return
    if remove == (target is not None):
        raise UserError("name an alias and its model, or an alias and --remove")
    if target is None:
        aliases.remove(paths, name)
    else:
        aliases.add(paths, name, target)
    asyncio.run(aliases.tell_if_running(paths))
    typer.echo(f"{name} is no longer an alias" if target is None else f"{name} now names model {target}")


def _show_aliases(known: dict[str, str], *, as_json_: bool) -> None:
    if as_json_:
        typer.echo(as_json(known))
    elif known:
        typer.echo(table(("ALIAS", "MODEL"), list(known.items())))
    else:
        typer.echo("no model has an alias: make one with `openrl model alias NAME MODEL`")


job_commands.register(app)  # after the commands above, as help lists them
