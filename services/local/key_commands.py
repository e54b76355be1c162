"""The commands about API keys. They only parse and print."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer

from services.local import keys
from services.local.client import connected
from services.local.config import Paths
from services.local.job_commands import Data, Json, paths_of
from services.local.printing import as_json, duration, table
from shared.contracts.tenants import DEFAULT_TENANT, KeyRecord

key_app = typer.Typer(help="The API keys with which clients reach the gateway.", no_args_is_help=True)


@key_app.command("create")
def create(
    *,
    data: Data = Path(".openrl"),
    tenant: Annotated[str, typer.Option(help="Who owns what is done with it; made if need be.")] = DEFAULT_TENANT,
    label: Annotated[str, typer.Option(help="For people.")] = "",
    project: Annotated[str | None, typer.Option(help="Where its sessions belong unless they say otherwise.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May read audit log and usage of all tenants.")] = False,
    days: Annotated[float | None, typer.Option(min=0, help="Good for so long. Default: for ever.")] = None,
    as_json_: Json = False,
) -> None:
    """Make a key and print it. It is shown this once."""

    async def made() -> tuple[str, KeyRecord]:
        async with connected(paths_of(data)) as bus:
            return await keys.create(bus, tenant, label=label, project=project, admin=admin, days=days)

    key, record = asyncio.run(made())
    typer.echo(as_json({"key": key, "record": record}) if as_json_ else key)


@key_app.command("list")
def show(*, data: Data = Path(".openrl"), as_json_: Json = False) -> None:
    """Show all keys. The keys themselves are kept nowhere."""
    records = asyncio.run(_listed(paths_of(data)))
    if as_json_:
        typer.echo(as_json(records))
        return
    now = time.time()
    rows = [
        (record.id, record.tenant, _standing(record, now), f"{duration(now - record.created)} ago", record.label)
        for record in records
    ]
    typer.echo(table(("KEY", "TENANT", "STATE", "MADE", "LABEL"), rows))


@key_app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="Its id, as `openrl key list` shows it.")], *, data: Data = Path(".openrl")
) -> None:
    """Have a key be refused from now on."""

    async def revoked() -> None:
        async with connected(paths_of(data)) as bus:
            await keys.revoke(bus, key)

    asyncio.run(revoked())
    typer.echo(f"key {key} is revoked")


async def _listed(paths: Paths) -> list[KeyRecord]:
    async with connected(paths) as bus:
        return await keys.listed(bus)


def _standing(record: KeyRecord, now: float) -> str:
    if record.revoked is not None:
        return "revoked"
    if record.expires is not None and record.expires <= now:
        return "expired"
    return "admin" if record.admin else "good"
