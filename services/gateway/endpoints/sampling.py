"""Samplers and requests for samples."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import msgspec
import numpy as np

from services.gateway import ids, results, submissions
from services.gateway.access import readable_checkpoint
from services.gateway.context import Call, Endpoint, Gateway
from services.gateway.endpoints.weights import MOST_SAMPLERS, new_sampler
from services.gateway.ids import Owned
from services.gateway.training_data import INT32, not_text
from shared import checkpoints, topology
from shared.contracts.arrays import Int32s
from shared.contracts.base import Strict
from shared.contracts.policies import PolicyRef
from shared.contracts.sampling import MAX_WIDTH, SampleRequest, SamplingParams
from shared.contracts.sessions import SamplerRecord
from shared.errors import MeshError, TemporaryError, UserError

MOST_SAMPLES = 4096
"""In one request; an engine's own limit is lower."""
MOST_SEQ = 2**63 - 1
MOST_CELLS = 1 << 22


class CreateSamplingSession(Strict):
    """Makes a sampler of a base model or a checkpoint."""

    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class JoinSamplingSession(Strict):
    """A copy of a sampling client asks for a number of its own."""

    sampling_session_id: str
    type: Literal["join_sampling_session"] = "join_sampling_session"


class EncodedText(Strict, tag_field="type", tag="encoded_text"):
    """Tokens."""

    tokens: list[int]


class _Image(msgspec.Struct, tag_field="type", tag="image"):
    """A picture."""


class _ImagePointer(msgspec.Struct, tag_field="type", tag="image_asset_pointer"):
    """A picture elsewhere."""


class _Dmel(msgspec.Struct, tag_field="type", tag="dmel"):
    """Sound."""


class ModelInput(Strict):
    """A prompt in parts."""

    chunks: list[EncodedText | _Image | _ImagePointer | _Dmel]


class Tensor(Strict):
    """A table in JSON."""

    data: list[int | float]
    dtype: Literal["int64", "float32"]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Sample(Strict):
    """Asks for samples."""

    prompt: ModelInput
    sampling_params: SamplingParams
    num_samples: int = 1
    sampling_session_id: str | None = None
    seq_id: int | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Tensor | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None
    """What stable_reinforce needs is recorded of every sample."""
    type: Literal["sample"] = "sample"


async def sample(gateway: Gateway, call: Call) -> dict[str, Any]:
    """Ask for samples, and return the promise of them. Once more changes nothing."""
    asked: Sample = call.body
    sampler, owned = await _sampler(gateway, call, asked)
    seq = asked.seq_id or 0
    request = _request(gateway, sampler, owned.request(seq), asked)
    if request.request_id not in gateway.in_flight:
        submissions.admit(gateway, sampler.owner, len(request.prompt))
    await gateway.hub.listen(owned.session)
    gateway.in_flight.add(request.request_id, sampler.owner, len(request.prompt))
    try:
        await gateway.bus.publish(topology.SAMPLES, request, msg_id=request.request_id, pool=sampler.base_model)
    except MeshError:
        gateway.in_flight.remove(request.request_id)
        raise
    sequences = [f"{request.request_id}/{number}" for number in range(request.num_samples)]
    return {"request_id": request.request_id, "sample_sequence_ids": sequences}


async def create(gateway: Gateway, call: Call) -> dict[str, str]:
    """Make a sampler."""
    asked: CreateSamplingSession = call.body
    await gateway.records.open_session(call.caller, asked.session_id)
    number = asked.sampling_session_seq_id
    if not 0 <= number < MOST_SAMPLERS:
        raise UserError(f"sampling_session_seq_id {number} is not possible: samplers of a session are numbered from 0")
    model, name, policy = await _source(gateway, call, asked)
    record = SamplerRecord(
        sampler=Owned(asked.session_id, "sample", number).id,
        session=asked.session_id,
        owner=call.caller.tenant,
        base_model=model,
        policy=policy,
        path=asked.model_path,
        created=time.time(),
        model_name=name,
    )
    await new_sampler(gateway, record)
    return {"type": "create_sampling_session", "sampling_session_id": record.sampler}


async def join(gateway: Gateway, call: Call) -> dict[str, Any]:
    """A number for one more client of a sampler, which no other client of it has."""
    sampler = call.body.sampling_session_id
    await gateway.records.sampler(call.caller, sampler)
    table = gateway.records.samplers.table
    for _ in range(100):  # many copies of a client may ask at the same moment
        entry = await table.get(sampler)
        if entry is None:
            break
        number = entry.value.clients + 1
        if await table.update(sampler, msgspec.structs.replace(entry.value, clients=number), entry.revision):
            return {"type": "join_sampling_session", "client_counter": number}
    raise TemporaryError(f"sampling session {sampler} has no number to give now: try again")


async def _source(gateway: Gateway, call: Call, asked: CreateSamplingSession) -> tuple[str, str, PolicyRef | None]:
    """What is sampled: the base model, what the client calls it, and the policy."""
    if asked.model_path is None:
        if asked.base_model is None:
            raise UserError("give base_model or model_path: what is to be sampled?")
        return gateway.models.served(asked.base_model), asked.base_model, None
    key = checkpoints.parse_path(asked.model_path)
    if key.kind != "sampler":
        raise UserError(
            f"{asked.model_path} is not made to be sampled: save_weights_for_sampler makes such checkpoints, called "
            "tinker://RUN/sampler_weights/NAME"
        )
    record = await readable_checkpoint(gateway, call, key, "sample")
    name = asked.base_model or await _name_of(gateway, key.run, record.base_model)
    if gateway.models.served(name) != record.base_model:
        raise UserError(f"{asked.model_path} is of {record.base_model}, not of {name}: leave base_model out")
    return record.base_model, name, record.policy


async def _name_of(gateway: Gateway, run: str, base_model: str) -> str:
    """What the client that trained a run calls its base model."""
    record = await gateway.records.runs.get(run)
    return (record.model_name if record is not None else "") or base_model


async def _sampler(gateway: Gateway, call: Call, asked: Sample) -> tuple[SamplerRecord, Owned]:
    if asked.sampling_session_id is None or asked.base_model is not None or asked.model_path is not None:
        raise UserError("sampling_session_id is missing: samples are asked of a sampling client, without base_model")
    if asked.seq_id is None or not 0 <= asked.seq_id <= MOST_SEQ:
        raise UserError(f"seq_id {asked.seq_id} is not possible: give one from 0, another for each request")
    owned = ids.parse_sampler(asked.sampling_session_id)
    return await gateway.records.sampler(call.caller, asked.sampling_session_id), owned


def _request(gateway: Gateway, sampler: SamplerRecord, request: str, asked: Sample) -> SampleRequest:
    prompt = _prompt(asked.prompt)
    _check(asked, len(prompt))
    targets, columns, note = _targets(asked.target_prompt_logprobs, len(prompt))
    return SampleRequest(
        request_id=request,
        base_model=sampler.base_model,
        prompt=prompt,
        params=asked.sampling_params,
        num_samples=asked.num_samples,
        policy=_policy(gateway, sampler),
        prompt_logprobs=bool(asked.prompt_logprobs),
        owner=sampler.owner,
        topk_prompt_logprobs=asked.topk_prompt_logprobs,
        topk_sample_logprobs=asked.topk_sample_logprobs,
        target_logprobs=targets,
        target_width=columns,
        prompt_logprobs_last_n=asked.prompt_logprobs_last_n,
        session=sampler.session,
        note=note,
    )


def _policy(gateway: Gateway, sampler: SamplerRecord) -> PolicyRef | None:
    policy = sampler.policy
    if policy is None or not sampler.inflight:
        return policy
    newest = gateway.inflight_policies.get(policy.run)
    return policy if newest is None or newest.version < policy.version else newest


def _prompt(prompt: ModelInput) -> Int32s:
    tokens = Int32s()
    for number, chunk in enumerate(prompt.chunks):
        if not isinstance(chunk, EncodedText):
            raise not_text(f"prompt: chunk {number}", str(chunk.__struct_config__.tag))
        try:
            tokens.extend(Int32s(chunk.tokens))
        except OverflowError:
            raise UserError(f"prompt: chunk {number} has token ids outside of 32 bits") from None
    if not tokens:
        raise UserError("the prompt is empty: it needs at least one token")
    if min(tokens) < 0:
        raise UserError(f"token id {min(tokens)} in the prompt is not possible: ids begin at 0")
    return tokens


def _check(asked: Sample, length: int) -> None:
    if not 1 <= asked.num_samples <= MOST_SAMPLES:
        raise UserError(f"num_samples is {asked.num_samples}: give 1 to {MOST_SAMPLES}")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if not 0 <= getattr(asked, name) <= MAX_WIDTH:
            raise UserError(f"{name} is {getattr(asked, name)}: give 0 to {MAX_WIDTH}")
    if asked.prompt_alt_tokens_k:
        raise UserError("prompt_alt_tokens_k is not available here: sample with max_tokens=1 from each prefix instead")
    last = asked.prompt_logprobs_last_n
    if last is not None and not (asked.prompt_logprobs and 1 <= last < length):
        raise UserError(
            f"prompt_logprobs_last_n is {last}: it goes with prompt_logprobs, and from 1 to {length - 1} for a prompt "
            f"of {length} tokens"
        )
    params = asked.sampling_params
    if params.seed is not None and not -(2**63) <= params.seed < 2**64:
        raise UserError(f"seed {params.seed} does not fit into 64 bits")


def _targets(tensor: Tensor | None, length: int) -> tuple[Int32s | None, int, str]:
    """Token ids to score, how many for each position, and what to note of their form."""
    if tensor is None:
        return None, 1, ""
    name = "target_prompt_logprobs"
    shape = tensor.shape or []
    if tensor.dtype != "int64" or len(shape) != 2 or shape[0] != length - 1:
        raise UserError(f"{name} is {tensor.dtype} of shape {shape}: give int64 of shape [{length - 1}, K]")
    if not 1 <= shape[1] <= MAX_WIDTH or math.prod(shape) > MOST_CELLS:
        raise UserError(f"{name} has {shape[1]} columns: give 1 to {MAX_WIDTH}, and {MOST_CELLS} cells in all")
    sparse = tensor.sparse_crow_indices is not None or tensor.sparse_col_indices is not None
    cells = _cells(tensor, shape, name) if sparse else np.array(tensor.data, np.float64)
    if cells.size != math.prod(shape) or (cells < -1).any() or (cells > INT32.max).any() or (cells % 1).any():
        raise UserError(f"{name} must have {math.prod(shape)} whole token ids, -1 where nothing is wanted")
    if (cells < 0).all():
        raise UserError(f"{name} names no token: leave it out")
    return Int32s(cells.astype(np.int64).tolist()), shape[1], results.targets_note(shape[1], sparse=sparse)


def _cells(tensor: Tensor, shape: list[int], name: str) -> np.ndarray[Any, Any]:
    """A sparse table (CSR) with -1 wherever it names nothing."""
    starts = np.array(tensor.sparse_crow_indices or [], np.float64).astype(np.int64)
    places = np.array(tensor.sparse_col_indices or [], np.float64).astype(np.int64)
    values = np.array(tensor.data, np.float64)
    counts = np.diff(starts)
    if starts.size != shape[0] + 1 or starts[0] != 0 or starts[-1] != values.size or (counts < 0).any():
        raise UserError(f"{name}: sparse_crow_indices must be {shape[0] + 1} places that rise from 0 to {values.size}")
    if places.size != values.size or ((places < 0) | (places >= shape[1])).any():
        raise UserError(f"{name}: sparse_col_indices must be {values.size} columns from 0 to {shape[1] - 1}")
    cells = np.full(shape, -1.0)
    cells[np.repeat(np.arange(shape[0]), counts), places] = values
    return cells.reshape(-1)


ENDPOINTS = (
    Endpoint("POST", "asample", sample, body=Sample),
    Endpoint("POST", "create_sampling_session", create, body=CreateSamplingSession),
    Endpoint("POST", "join_sampling_session", join, body=JoinSamplingSession),
)
