"""Runs and samplers, looked up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.gateway.auth import user_urn
from services.gateway.context import Call, Endpoint, Gateway
from services.gateway.errors import NotFound
from services.gateway.ids import shown
from services.gateway.rest.answers import Sampler, TrainingRun, TrainingRuns, at, checkpoint_of, metadata_of
from services.gateway.rest.holdings import live_checkpoints, visible_runs
from services.gateway.rest.queries import Page, Scope
from services.gateway.rest.search import project_of
from shared.contracts.checkpoints import CheckpointKind, CheckpointRecord
from shared.contracts.training import RunRecord

RUNS_OF_A_PAGE = 20

Latest = Mapping[tuple[str, CheckpointKind], CheckpointRecord]


async def list_runs(gateway: Gateway, call: Call) -> TrainingRuns:
    """A page of runs, newest first; of one project, if the query names it."""
    page = Page.of(call.query, RUNS_OF_A_PAGE)
    runs = await visible_runs(gateway, Scope.of(call.query, call.caller))
    if (project := call.query.get("project_id")) is not None:
        sessions = await gateway.sessions.fresh()
        inside = {session.session for session in sessions.values() if project_of(session) == project}
        runs = [run for run in runs if run.session in inside]
    return TrainingRuns(await _told(gateway, page.cut(runs)), page.cursor(runs))


async def get_run(gateway: Gateway, call: Call) -> TrainingRun:
    """One run."""
    run = call.path["run"]
    record = (await gateway.runs.fresh()).get((run,))
    if record is None or not Scope.of(call.query, call.caller).has(record.owner):
        raise NotFound(f"there is no training run {shown(run)}")
    return (await _told(gateway, [record]))[0]


async def get_sampler(gateway: Gateway, call: Call) -> Sampler:
    """What a sampler samples from."""
    record = await gateway.records.sampler(call.caller, call.path["sampler"])
    return Sampler(record.sampler, record.model_name or record.base_model, record.path)


def latest_of(checkpoints: Iterable[CheckpointRecord], runs: frozenset[str]) -> Latest:
    """The newest checkpoint of each kind of each of these runs."""
    latest: dict[tuple[str, CheckpointKind], CheckpointRecord] = {}
    for record in checkpoints:
        place = record.key.run, record.key.kind
        if record.key.run in runs and (place not in latest or latest[place].created < record.created):
            latest[place] = record
    return latest


async def _told(gateway: Gateway, runs: Iterable[RunRecord]) -> list[TrainingRun]:
    runs = list(runs)
    latest = latest_of(await live_checkpoints(gateway), frozenset(run.run for run in runs))
    activity = await gateway.run_activity.fresh()
    told = []
    for run in runs:
        active = activity.get((run.run,))
        told.append(_run(run, max(run.created, active.at if active else 0.0), latest))
    return told


def _run(run: RunRecord, active: float, latest: Latest) -> TrainingRun:
    training, sampler = latest.get((run.run, "training")), latest.get((run.run, "sampler"))
    return TrainingRun(
        training_run_id=run.run,
        base_model=run.model_name or run.base_model,
        model_owner=user_urn(run.owner),
        lora_rank=run.lora.rank,
        last_request_time=at(active),
        last_checkpoint=checkpoint_of(training) if training else None,
        last_sampler_checkpoint=checkpoint_of(sampler) if sampler else None,
        user_metadata=metadata_of(run.user_metadata),
    )


ENDPOINTS = (
    Endpoint("GET", "samplers/{sampler}", get_sampler),
    Endpoint("GET", "training_runs", list_runs),
    Endpoint("GET", "training_runs/{run}", get_run),
)
