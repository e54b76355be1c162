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

MOST_HEADER = 100_000_000
"""Bytes, as safetensors itself bounds it."""

Tell = Callable[[str], None]


class _Tensor(msgspec.Struct):
    """What matters of a tensor in a header; the entry for metadata has none of it."""

    data_offsets: tuple[int, int] = (0, 0)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


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
    for name, directory in models.items():
        try:
            check_directory(directory)
        except UserError as error:
            raise UserError(
                f"model {name!r} cannot be served: {error}; or forget it with `openrl model remove {name}`, or name "
                "others with --model"
            ) from None
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
    if not _has_chat_template(directory):
        tell(
            f"warning: the tokenizer in {directory} has no chat template, which jobs need: use an instruction-tuned "
            "model, or add a chat_template to its tokenizer_config.json"
        )
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
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is not a directory: name the one that holds the model's files")
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
    check_weights(directory)


def check_weights(directory: Path) -> None:
    """Raise `UserError` for a weights file that is cut off or no safetensors, or one that the index misses.

    Such a file begins with the length of its header, which says where each tensor ends: nothing else is read.
    """
    for file in sorted(directory.glob("*.safetensors")):
        expected, size = _expected_size(file), file.stat().st_size
        if expected is None:
            raise UserError(f"{file} is no safetensors file, or its beginning is damaged: fetch it again")
        if size != expected:
            raise UserError(f"{file} has {size:,} bytes and should have {expected:,}: it is damaged, fetch it again")
    for index in directory.glob("*.safetensors.index.json"):
        if missing := sorted(name for name in _indexed(index) if not (directory / name).is_file()):
            raise UserError(f"{directory} lacks {', '.join(missing)}, which {index.name} names: fetch the model again")


def _expected_size(file: Path) -> int | None:
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if not 0 < length <= MOST_HEADER:
            return None
        try:
            header = msgspec.json.decode(content.read(length), type=dict[str, _Tensor])
        except msgspec.MsgspecError:
            return None
    return 8 + length + max((tensor.data_offsets[1] for tensor in header.values()), default=0)


def _indexed(index: Path) -> set[str]:
    try:
        return set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"{index} cannot be read ({error}): fetch the model again") from None


def _has_chat_template(directory: Path) -> bool:
    if any(directory.glob("chat_template*")):
        return True
    try:
        return bool(msgspec.json.decode((directory / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, msgspec.MsgspecError, AttributeError):
        return False


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
