"""Other names of models: programs that accept only names of their own table are served all the same.

The data directory has them; the mesh learns of them when it comes up, and at once while it runs.
"""

from __future__ import annotations

import msgspec

from services.local import models
from services.local.client import connected
from services.local.config import Paths
from services.local.state import replace_file, running_state
from shared import topology
from shared.bus import Bus
from shared.errors import UserError


def registered(paths: Paths) -> dict[str, str]:
    """All aliases with the models that they name. Raise `UserError` if the file is damaged."""
    try:
        return msgspec.json.decode(paths.aliases.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(
            f"{paths.aliases} cannot be read ({error}): mend or delete it, and make the aliases again"
        ) from None


def add(paths: Paths, alias: str, model: str) -> None:
    """Give a model another name, or an alias another model. Raise `UserError` for names that cannot be used so."""
    models.check_name(alias)
    known = models.registered(paths)
    if alias in known:
        raise UserError(f"{alias!r} is the name of a model itself: choose another alias")
    if model not in known:
        raise UserError(
            f"model {model!r} is not registered: `openrl model add` adds it; registered: {', '.join(known) or 'none'}"
        )
    _write(paths, registered(paths) | {alias: model})


def remove(paths: Paths, alias: str) -> None:
    """Forget an alias. Raise `UserError` if there is none of this name."""
    known = registered(paths)
    if alias not in known:
        raise UserError(f"there is no alias {alias!r}; there are: {', '.join(known) or 'none'}")
    del known[alias]
    _write(paths, known)


def forget_model(paths: Paths, model: str) -> list[str]:
    """Forget all aliases of a model; which ones."""
    known = registered(paths)
    gone = [alias for alias, target in known.items() if target == model]
    if gone:
        _write(paths, {alias: target for alias, target in known.items() if target != model})
    return gone


async def tell(bus: Bus, paths: Paths) -> None:
    """Have the mesh know exactly the aliases of the data directory."""
    table, wanted = bus.table(topology.ALIASES), registered(paths)
    there = {entry.key[0]: entry.value for entry in await table.items()}
    for alias in there.keys() - wanted.keys():
        await table.delete(alias)
    for alias, model in wanted.items():
        if there.get(alias) != model:
            await table.put(alias, model)


async def tell_if_running(paths: Paths) -> None:
    """The same, if a mesh runs on the data directory."""
    if running_state(paths) is not None:
        async with connected(paths) as bus:
            await tell(bus, paths)


def _write(paths: Paths, aliases: dict[str, str]) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    replace_file(paths.aliases, msgspec.json.format(msgspec.json.encode(dict(sorted(aliases.items()))), indent=2))
