"""Rules about sizes that hold for several fields of a job together. Pure.

What a coordinator writes down about a job must stay below the megabyte that NATS takes: `tests/unit/test_limits.py`
builds the largest record. Limits of single fields are in the contracts.
"""

from __future__ import annotations

from shared import wire
from shared.contracts.jobs import FieldError, JobSpec

MOST_EPISODES = 65_536
"""In a step."""
MOST_GROUPS_OUT = 16_384
"""Training groups that are outstanding at the same time."""
MOST_EVALUATIONS = 2_000
MOST_SPEC_BYTES = 256 * 1024


def check_sizes(spec: JobSpec) -> list[FieldError]:
    """What is too large about a job, each with the value, the limit and the way out."""
    algorithm, evaluation = spec.algorithm, spec.evaluation
    errors = []
    if (episodes := algorithm.groups_per_step * algorithm.group_size) > MOST_EPISODES:
        what = f"{algorithm.groups_per_step} groups of {algorithm.group_size} are {episodes} episodes in a step"
        errors.append(_over("algorithm.groups_per_step", what, MOST_EPISODES, "take fewer groups, or smaller ones"))
    if (groups := (algorithm.max_staleness + 1) * algorithm.groups_per_step) > MOST_GROUPS_OUT:
        what = f"with {algorithm.groups_per_step} groups in a step, {groups} are out at the same time"
        errors.append(_over("algorithm.max_staleness", what, MOST_GROUPS_OUT, "take less staleness, or fewer groups"))
    if evaluation.tasks and evaluation.every:
        count = algorithm.steps // evaluation.every
        if count > MOST_EVALUATIONS:
            what = f"{evaluation.every} makes {count} evaluations in {algorithm.steps} steps"
            errors.append(_over("evaluation.every", what, MOST_EVALUATIONS, "evaluate less often"))
    if (size := len(wire.encode(spec, json=True))) > MOST_SPEC_BYTES:
        way = "put large parameters into files, and give their names"
        errors.append(_over("", f"the whole job is {size} bytes of JSON", MOST_SPEC_BYTES, way))
    return errors


def _over(path: str, what: str, most: int, way_out: str) -> FieldError:
    return FieldError(path=path, message=f"{what}; the limit is {most}: {way_out}")
