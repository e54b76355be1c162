"""Runs: begun, trained, described."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any, Literal

from services.gateway import provenance, submissions, training_data
from services.gateway.access import readable_checkpoint
from services.gateway.context import Call, Endpoint, Gateway
from services.gateway.ids import Owned
from services.gateway.submissions import Addressed, Head
from shared import checkpoints
from shared.contracts.base import Contract, Strict
from shared.contracts.checkpoints import CheckpointKey
from shared.contracts.policies import MAX_RANK, LoraSpec
from shared.contracts.training import (
    AdamParams,
    AnyOperation,
    CreateRun,
    ForwardBackward,
    LoadState,
    OptimStep,
    RunRecord,
)
from shared.errors import UserError

MOST_RUNS = 10**9
LARGE_BODY = 64 * 1024
"""Training data of more bytes are read in a thread, so that nobody waits for them."""
ADAM = "adamw"


class OptimizerConfig(Contract):
    """Which optimizer a run has for its life."""

    type: str = ADAM


class LoraConfig(Strict):
    """The shape of a run's adapter."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(Strict):
    """Begins a run."""

    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()
    type: Literal["create_model"] = "create_model"


class LoadWeights(Strict):
    """Begins a run with a checkpoint, or loads one into a run."""

    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None
    type: Literal["load_weights"] = "load_weights"


class OptimStepRequest(Strict):
    """Applies the gathered gradient."""

    model_id: str
    seq_id: int
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None
    type: Literal["optim_step"] = "optim_step"


class GetInfo(Strict):
    """Asks what a run is."""

    model_id: str
    type: Literal["get_info"] = "get_info"


# -- the beginning of a run ------------------------------------------------------------------------------------------


async def create(gateway: Gateway, call: Call) -> dict[str, str]:
    """Begin a run with a fresh adapter."""
    asked: CreateModel = call.body
    if asked.lora_config is None:
        raise UserError("lora_config is missing: runs train low-rank adapters, give their rank")
    _check_optimizer(asked.optimizer_config)
    base_model = gateway.models.served(asked.base_model)
    owned = await _new_run(gateway, call, asked.session_id, asked.model_seq_id)
    record = RunRecord(
        run=owned.id,
        base_model=base_model,
        lora=_lora(asked.lora_config),
        owner=call.caller.tenant,
        session=owned.session,
        created=time.time(),
        user_metadata=asked.user_metadata or {},
        model_name=asked.base_model,
    )
    return await _begin(gateway, call, owned, record)


async def load(gateway: Gateway, call: Call) -> dict[str, str]:
    """Load a checkpoint: as the beginning of a run, or into one."""
    where = _whole_or_part(call.body)
    if where is not None:
        return await submissions.operation(gateway, call, where, lambda _, head: _load_into(gateway, call, head))
    asked = submissions.decoded(call.body, LoadWeights)
    if asked.session_id is None or asked.model_seq_id is None:
        raise UserError("load_weights needs session_id and model_seq_id for a new run, or model_id and seq_id of one")
    _check_optimizer(asked.optimizer_config or OptimizerConfig())
    key = _training_path(asked.path)
    found = await readable_checkpoint(gateway, call, key, "load", asked.weights_access_token)
    name = asked.base_model or found.base_model
    if gateway.models.served(name) != found.base_model:
        raise UserError(f"{asked.path} is of {found.base_model}, not of {name}: leave base_model out")
    owned = await _new_run(gateway, call, asked.session_id, asked.model_seq_id)
    record = RunRecord(
        run=owned.id,
        base_model=found.base_model,
        lora=found.lora,
        owner=call.caller.tenant,
        session=owned.session,
        created=time.time(),
        user_metadata=asked.user_metadata or {},
        model_name=name,
    )
    return await _begin(gateway, call, owned, record, source=key, optimizer=asked.optimizer, note=asked.path)


async def _load_into(gateway: Gateway, call: Call, head: Head) -> AnyOperation:
    asked = submissions.decoded(call.body, LoadWeights)
    key = _training_path(asked.path)
    if key.run != head["run"]:  # one of its own may still be on its way: the trainer finds it when its turn comes
        await readable_checkpoint(gateway, call, key, "load", asked.weights_access_token)
    return LoadState(**head, source=key, optimizer=asked.optimizer, note=asked.path)


async def _new_run(gateway: Gateway, call: Call, session: str, number: int) -> Owned:
    await gateway.records.open_session(call.caller, session)
    if not 0 <= number < MOST_RUNS:
        raise UserError(f"model_seq_id {number} is not possible: runs of a session are numbered from 0")
    return Owned(session, "train", number)


async def _begin(gateway: Gateway, call: Call, owned: Owned, record: RunRecord, **how: Any) -> dict[str, str]:
    before = await gateway.records.runs.get(record.run)
    if before is None:
        _check_runs(gateway, call)
        await gateway.records.runs.table.create(record.run, record)
        await gateway.audit(call, "training_run_created", run=record.run, base_model=record.base_model)
    elif before.owner != record.owner or before.base_model != record.base_model:
        raise UserError(f"training run {record.run} exists already, of {before.base_model}")
    operation = CreateRun(
        run=record.run,
        seq=0,
        request_id=owned.request(0),
        owner=record.owner,
        base_model=record.base_model,
        lora=record.lora,
        **how,
    )
    return await submissions.submit(gateway, owned.session, operation)


def _check_runs(gateway: Gateway, call: Call) -> None:
    tenant = call.caller.tenant
    most = gateway.limits_of(tenant).runs
    there = sum(record.owner == tenant and not record.closed for record in gateway.runs.values.values())
    if most is not None and there >= most:
        raise UserError(f"{tenant} has {there} open training runs and may have {most}: end a session to close its runs")


def _check_optimizer(config: OptimizerConfig) -> None:
    if config.type != ADAM:
        raise UserError(f"optimizer {config.type!r} is not available here: leave optimizer out, for AdamW")


def _lora(config: LoraConfig) -> LoraSpec:
    if not 1 <= config.rank <= MAX_RANK:
        raise UserError(f"lora_config: rank is {config.rank}, it must be from 1 to {MAX_RANK}")
    if config.seed is not None and not -(2**63) <= config.seed < 2**63:
        raise UserError(f"lora_config: seed {config.seed} does not fit into 64 bits")
    parts = {"train_attn": config.train_attn, "train_mlp": config.train_mlp, "train_unembed": config.train_unembed}
    if not any(parts.values()):
        raise UserError("lora_config: train_attn, train_mlp and train_unembed are all off: there is nothing to train")
    return LoraSpec(rank=config.rank, seed=config.seed, **parts)


def _training_path(path: str) -> CheckpointKey:
    key = checkpoints.parse_path(path)
    if key.kind != "training":
        raise UserError(f"{path} holds weights to sample from, not to train: load one that save_state has written")
    return key


def _whole_or_part(body: bytes) -> Addressed | None:
    """Where a request to load belongs that is for a run which is there; None: it begins one."""
    found = submissions.decoded(body, _Either)
    if found.model_id is None:
        return None
    return submissions.addressed(body)


class _Either(Contract):
    model_id: str | None = None


# -- passes and steps ------------------------------------------------------------------------------------------------


async def forward_backward(gateway: Gateway, call: Call) -> dict[str, str]:
    """Compute a loss and, unless only that is asked, its gradient."""
    large = len(call.body) > LARGE_BODY
    message = await asyncio.to_thread(training_data.parse, call.body) if large else training_data.parse(call.body)

    async def make(_: RunRecord, head: Head) -> AnyOperation:
        loss = training_data.loss_of(message)
        data = await asyncio.to_thread(training_data.data_of, message) if large else training_data.data_of(message)
        if loss.name == "stable_reinforce":
            data = await provenance.with_sampled_logprobs(gateway, head["run"], message, data)
        return ForwardBackward(
            **head,
            data=data,
            loss=loss,
            forward_only=message.forward_only,
            note=training_data.note_of(message),
        )

    where = Addressed(model_id=message.model_id, seq_id=message.seq_id)
    return await submissions.operation(gateway, call, where, make)


async def optim_step(gateway: Gateway, call: Call) -> dict[str, str]:
    """Apply the gathered gradient."""

    async def make(_: RunRecord, head: Head) -> AnyOperation:
        asked = submissions.decoded(call.body, OptimStepRequest)
        if asked.optimizer_params is not None:
            _check_optimizer(OptimizerConfig(type=str(asked.optimizer_params.get("type"))))
            raise UserError("optimizer_params is for other optimizers: send adam_params")
        if asked.adam_params is None:
            raise UserError("adam_params is missing")
        for name in AdamParams.__struct_fields__:
            if not math.isfinite(value := getattr(asked.adam_params, name)):
                raise UserError(f"adam_params: {name} is {value}, it must be a finite number")
        return OptimStep(**head, adam=asked.adam_params)

    return await submissions.operation(gateway, call, submissions.addressed(call.body), make)


# -- description -----------------------------------------------------------------------------------------------------


async def info(gateway: Gateway, call: Call) -> dict[str, Any]:
    """What a run is."""
    run = await gateway.records.run(call.caller, call.body.model_id)
    name = run.model_name or run.base_model
    return {
        "type": "get_info",
        "model_id": run.run,
        "model_data": {"model_name": name, "tokenizer_id": tokenizer_of(gateway, run.base_model)},
        "model_name": name,
        "is_lora": True,
        "lora_rank": run.lora.rank,
        "optimizer_config": {"type": ADAM},
    }


def tokenizer_of(gateway: Gateway, base_model: str) -> str:
    """Where a client finds a model's tokenizer: a directory that it can read, or the name on the hub.

    Clients cut what they are given at a colon, so a directory with one is of no use to them.
    """
    directory = gateway.models.directory(base_model) if gateway.config.local_files else None
    return base_model if directory is None or ":" in directory else directory


ENDPOINTS = (
    Endpoint("POST", "forward_backward", forward_backward, body=bytes),
    Endpoint("POST", "optim_step", optim_step, body=bytes),
    Endpoint("POST", "create_model", create, body=CreateModel),
    Endpoint("POST", "load_weights", load, body=bytes),
    Endpoint("POST", "get_info", info, body=GetInfo),
)
