"""The models that a mesh can serve: names, and the directories that hold their files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from services.local.config import Paths
from services.local.state import replace_file, running_state
from shared.errors import UserError
from shared.topology import token

DEMO_MODEL = "smollm2-135m-instruct"
"""The one model that needs no path: `shared.models.fetch` knows where to get it."""
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")
MAX_NAME = 96
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")

Tell = Callable[[str], None]


def registered(paths: Paths) -> dict[str, Path]:
    """All names with their directories. Raise `UserError` if the file is damaged."""
    try:
        found = msgspec.json.decode(paths.registry.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(
            f"{paths.registry} cannot be read ({error}): mend or delete it, and add the models again"
        ) from None
    return {name: Path(directory) for name, directory in found.items()}


def chosen(paths: Paths, names: Sequence[str]) -> dict[str, Path]:
    """The models to serve: those named, or else all. Raise `UserError` if one is unknown or its files are not there."""
    known = registered(paths)
    if not known:
        raise UserError(f"no model is registered in {paths.root}: add one with `openrl model add {DEMO_MODEL}`")
    for name in names:
        if name not in known:
            raise UserError(
                f"model {name!r} is not registered: `openrl model add` adds it; registered: {', '.join(known)}"
            )
    models = {name: known[name] for name in (names or known)}
    for directory in models.values():
        check_directory(directory)
    return models


def add(paths: Paths, name: str, source: str | None, *, tell: Tell) -> Path:
    """Register a model and return its directory.

    `source` is a directory, which is used where it is, or a hub id, which is fetched. None: only for `DEMO_MODEL`.
    Raise `UserError` for a bad or taken name, and for files that are no model.
    """
    check_name(name)
    known = registered(paths)
    directory = _directory(paths, name, source, tell)
    check_directory(directory)
    if known.get(name, directory) != directory:
        raise UserError(f"model {name!r} is registered as {known[name]}: remove it first, or choose another name")
    _write(paths, known | {name: directory})
    return directory


def remove(paths: Paths, name: str) -> Path | None:
    """Forget a model. Files that were fetched are deleted, others stay; returns the directory that was deleted."""
    known = registered(paths)
    if name not in known:
        raise UserError(f"model {name!r} is not registered; registered: {', '.join(known) or 'none'}")
    if (state := running_state(paths)) and any(service.base_model == name for service in state.services):
        raise UserError(f"model {name!r} is being served: end the mesh with `openrl down` first")
    directory = known.pop(name)
    _write(paths, known)
    if not directory.is_relative_to(paths.models) or directory in known.values():
        return None
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def check_name(name: str) -> None:
    """Raise `UserError` if a model cannot be called so."""
    if len(name) > MAX_NAME or not NAME.match(name):
        raise UserError(
            f"model name {name!r} cannot be used: letters, digits, '.', '_' and '-', with at most one '/' between, "
            f"up to {MAX_NAME} characters"
        )


def check_directory(directory: Path) -> None:
    """Raise `UserError` if a directory does not hold a causal language model as Hugging Face writes it."""
    if not directory.is_dir():
        raise UserError(f"model directory {directory} does not exist: name a directory, or a hub id like org/model")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json: it is not a model directory as `save_pretrained` writes it")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} is a model directory without weights: it needs at least one .safetensors file")
    if not any((directory / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{directory} is a model directory without a tokenizer: put tokenizer.json and tokenizer_config.json there"
        )


def _directory(paths: Paths, name: str, source: str | None, tell: Tell) -> Path:
    if source is None and name != DEMO_MODEL:
        raise UserError(
            f"where is model {name!r}? Give a directory or a hub id; only {DEMO_MODEL} is known without one"
        )
    if source is not None and (Path(source).expanduser().exists() or not HUB_ID.match(source)):
        return Path(source).expanduser().resolve()
    target = paths.models / token(name)
    if not target.exists():
        fetch(target, name, source, tell)
    return target


def fetch(target: Path, name: str, hub_id: str | None, tell: Tell) -> None:
    """Fetch a model's files in a process of its own, which may load torch. Raise `UserError` with its last words."""
    target.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "shared.models.fetch", name, str(target)] + (["--hub", hub_id] if hub_id else [])
    problem = ""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            problem = line.strip().removeprefix("error: ")
            if problem and problem == line.strip():
                tell(problem)
    if process.returncode:
        raise UserError(f"model {name!r} could not be fetched: {problem}")


def _write(paths: Paths, models: dict[str, Path]) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    content = msgspec.json.encode({name: str(directory) for name, directory in sorted(models.items())})
    replace_file(paths.registry, msgspec.json.format(content, indent=2))
