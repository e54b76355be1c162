"""What users ask of a running mesh, over the bus like any other program: submit, look at and control jobs, export."""

from __future__ import annotations

import contextlib
import json
import tempfile
import tomllib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

from services.local.config import Paths
from services.local.state import require_running
from shared import topology, validation
from shared.blobs import BlobStore
from shared.bus import Bus
from shared.contracts.jobs import ControlJob, FieldError, JobAnswer, JobRecord, SubmitJob
from shared.contracts.policies import PolicyRecord
from shared.errors import PermanentError, TemporaryError, UserError
from shared.topology import Channel

ANSWER_SECONDS = 30.0
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

Action = Literal["cancel", "pause", "resume", "delete"]
_CONTROL: dict[Action, Channel[ControlJob]] = {
    "cancel": topology.CANCEL,
    "pause": topology.PAUSE,
    "resume": topology.RESUME,
    "delete": topology.DELETE,
}


class Refused(UserError):
    """The coordinator refused a command. Its text has one line for each error."""

    def __init__(self, what: str, errors: Sequence[FieldError]) -> None:
        self.errors = list(errors)
        lines = [f"{error.path}: {error.message}" if error.path else error.message for error in errors]
        super().__init__("\n".join([f"{what} was refused", *lines]))


class _RepeatedKey(Exception):
    """An object has the same key twice."""


@contextlib.asynccontextmanager
async def connected(paths: Paths) -> AsyncIterator[Bus]:
    """A connection to the mesh that runs on a data directory. Raise `UserError` if none does."""
    state = require_running(paths)
    bus = await Bus.connect(state.nats_url, BlobStore(state.blob_url), name="openrl")
    try:
        yield bus
    finally:
        await bus.close()


def parse_spec(text: str, source: str) -> Any:
    """A job's specification as plain data: TOML if `source` ends so, else JSON. The coordinator says what is wrong."""
    try:
        spec = tomllib.loads(text) if source.endswith(".toml") else json.loads(text, object_pairs_hook=_single_keys)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source} is not valid TOML: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not valid JSON: {error}; a TOML file must be called .toml") from None
    except _RepeatedKey as error:
        raise UserError(f"{source} has the key {error.args[0]!r} twice in one object: leave one") from None
    # On the way to the coordinator NaN would become null.
    if errors := list(validation.unwritable(spec, validation.Place("", "field"))):
        raise Refused("the job", errors)
    return spec


def _single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKey(key)
        found[key] = value
    return found


def read_spec(path: Path) -> Any:
    """See `parse_spec`. Raise `UserError` if the file cannot be read."""
    try:
        return parse_spec(path.read_text(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text: a job is described in JSON or TOML, in UTF-8") from None


async def submit(bus: Bus, spec: Any) -> str:
    """Ask for a job and return its id. Raise `Refused` with every error in the specification."""
    answer = await _ask(bus, topology.SUBMIT, SubmitJob(spec=spec, request_id=bus.new_request()), "the job")
    if answer.job is None:
        raise PermanentError("the coordinator answered without naming a job")
    return answer.job


async def control(bus: Bus, action: Action, job: str) -> None:
    """Cancel, pause, resume or delete a job. Raise `Refused` if that cannot be done."""
    command = ControlJob(job=job, request_id=bus.new_request())
    await _ask(bus, _CONTROL[action], command, f"{action} {job}")


async def jobs(bus: Bus) -> list[JobRecord]:
    """All jobs, oldest first."""
    entries = await bus.table(topology.JOB_RECORDS).items()
    return sorted((entry.value for entry in entries), key=lambda job: job.created)


async def job(bus: Bus, name: str) -> JobRecord:
    """One job. Raise `UserError` if there is none of this id."""
    entry = await bus.table(topology.JOB_RECORDS).get(name)
    if entry is None:
        known = [record.job for record in await jobs(bus)]
        raise UserError(f"there is no job {name!r}; the newest: {', '.join(known[-5:]) or 'none yet'}")
    return entry.value


async def export(bus: Bus, name: str, directory: Path) -> PolicyRecord:
    """Copy a job's newest policy into a new directory, as PEFT reads it.

    Raise `UserError` if there is none yet or the directory is not empty, and `PermanentError` if a file is missing
    from the blob store or is not what was written there.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: an adapter goes into a directory of its own")
    record = await job(bus, name)
    if record.policy is None:
        raise UserError(f"job {name} is still the base model: it is {record.phase}, at step {record.step}")
    entry = await bus.table(topology.POLICIES).get((record.policy.run, str(record.policy.version)))
    if entry is None:
        raise PermanentError(f"policy {record.policy} of job {name} is not in the policies table")
    policy = entry.value
    contents = {CONFIG_FILE: await bus.blobs.get(policy.config), WEIGHTS_FILE: await bus.blobs.get(policy.weights)}
    _write_files(directory, contents)
    return policy


async def _ask(bus: Bus, channel: Channel[Any], message: Any, what: str) -> JobAnswer:
    try:
        answer = await bus.ask(channel, message, timeout=ANSWER_SECONDS)
    except TemporaryError as error:
        raise TemporaryError(f"{error}: see `openrl status`; the coordinator takes the request once it runs") from None
    if not isinstance(answer, JobAnswer):
        raise PermanentError(f"the coordinator answered with a {type(answer).__name__}")
    if answer.errors:
        raise Refused(what, answer.errors)
    return answer


def _write_files(directory: Path, contents: dict[str, bytes]) -> None:
    """All files or none: a directory that has an adapter has a whole one."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        part.chmod(0o755)
        for name, content in contents.items():
            (part / name).write_bytes(content)
        part.replace(directory)
    except OSError as error:
        raise UserError(f"the adapter cannot be written to {directory}: {error.strerror}") from None
