"""The examples are what they say."""

from __future__ import annotations

import json
from pathlib import Path

from services.coordinator.validation import check, read
from services.environment.registry import Registry
from shared.contracts.replicas import ReplicaRecord

DEMO = Path(__file__).parents[2] / "examples" / "demo.json"


def replica(service: str, base_model: str | None = None, offers: tuple[str, ...] = ()) -> ReplicaRecord:
    return ReplicaRecord(
        replica=service, service=service, pid=1, host="h", metrics_port=1, base_model=base_model, offers=list(offers)
    )


def test_the_demo_is_a_valid_job_with_256_tasks_that_it_never_trains_on() -> None:
    model = "smollm2-135m-instruct"
    draft = read(json.loads(DEMO.read_text()))
    living = [
        replica("sampler", model),
        replica("trainer", model),
        replica("environment", offers=("environment:arithmetic",)),
        replica("reward", offers=("reward:exact_match",)),
    ]
    assert check(draft, living) == []
    spec = draft.spec
    assert spec is not None
    assert Registry.load([]).errors(spec.environment.name, spec.environment.params, "environment") == []
    environment = Registry.load([]).make(spec.environment)
    assert spec.evaluation.tasks == environment.size("held_out") == 256
    size = environment.size("train")
    assert size is not None
    held_out = {environment.task("held_out", number, 0).question for number in range(256)}
    trained = {environment.task("train", number, 0).question for number in range(size)}
    assert len(held_out) == 256
    assert not held_out & trained
