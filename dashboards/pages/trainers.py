"""Trainers: what waits for them, what their passes hold, and where runs reside."""

from __future__ import annotations

from dashboards.by_model import CALLED, MODEL, recorded
from dashboards.model import RATE, Choice, Page, Query, Row, lines, quantiles, share, stacked

REPLICA = "{{instance}}"


def per_pass(histogram: str) -> Query:
    """What a pass holds on average."""
    sums, counts = (f"sum by (instance) (rate({histogram}_{part}{{{MODEL}}}[{RATE}]))" for part in ("sum", "count"))
    return Query(f"{sums} / ({counts} > 0)", REPLICA)


PAGE = Page(
    uid="openrl-trainers",
    title="OpenRL / Trainers",
    description="What waits for the trainers of each base model, what their passes hold, and where runs reside.",
    choices=(Choice("base_model", "Base model", "openrl:trainer_replicas:count", "base_model"),),
    rows=(
        Row(
            "Load",
            (
                lines("Backlog", "Tokens of operations that were read.", recorded("trainer_backlog_tokens:sum")),
                lines(
                    "Operations of nobody's runs",
                    "Runs that no trainer holds. More than a moment: there is no trainer, or none with room.",
                    recorded("trainer_queued_operations:max"),
                ),
                lines(
                    "Longest wait",
                    "How long the oldest operation waits.",
                    recorded("trainer_oldest_seconds:max"),
                    unit="s",
                ),
                lines("Tokens", "Through passes, in a second.", recorded("trainer_tokens:rate1m")),
                share("Duty", "Part of the time in the engine.", recorded("trainer_duty:avg1m")),
                lines(
                    "Replicas and runs",
                    "Trainers that give metrics, and the runs that they hold.",
                    recorded("trainer_replicas:count", f"{CALLED} trainers"),
                    recorded("trainer_runs:sum", f"{CALLED} runs"),
                ),
            ),
        ),
        Row(
            "Passes",
            (
                lines("Tokens in a pass", "On average.", per_pass("openrl_trainer_pass_tokens")),
                lines("Runs in a pass", "On average: more than one share it.", per_pass("openrl_trainer_pass_runs")),
                lines(
                    "Time of a pass",
                    "Forward and backward.",
                    *quantiles("openrl_trainer_pass_seconds", "base_model", MODEL),
                    unit="s",
                ),
                lines(
                    "Passes",
                    "In a second.",
                    Query(f"sum by (instance) (rate(openrl_trainer_passes_total{{{MODEL}}}[{RATE}]))", REPLICA),
                    unit="cps",
                ),
                stacked(
                    "Operations",
                    "By kind and what became of them, in a second.",
                    Query(
                        f"sum by (op, outcome) (rate(openrl_trainer_operations_total{{{MODEL}}}[{RATE}]))",
                        "{{op}} {{outcome}}",
                    ),
                    unit="cps",
                ),
                lines(
                    "Operations waiting",
                    "Read from the logs, not executed.",
                    Query(f"openrl_trainer_backlog{{{MODEL}}}", REPLICA),
                ),
            ),
        ),
        Row(
            "Residency",
            (
                stacked(
                    "Where runs are",
                    "On the device, in host memory, only in the blob store.",
                    Query(f"sum(openrl_trainer_resident_runs{{{MODEL}}})", "device"),
                    Query(f"sum(openrl_trainer_parked_runs{{{MODEL}}})", "host"),
                    Query(f"sum(openrl_trainer_evicted_runs{{{MODEL}}})", "store"),
                ),
                share(
                    "Places in use",
                    "Adapters on the device, and runs held, of those that there is room for.",
                    Query(
                        f"openrl_trainer_resident_runs{{{MODEL}}} / openrl_trainer_resident_slots{{{MODEL}}}",
                        f"{REPLICA} on the device",
                    ),
                    Query(
                        f"openrl_trainer_runs{{{MODEL}}} / openrl_trainer_run_slots{{{MODEL}}}",
                        f"{REPLICA} held",
                    ),
                ),
                lines(
                    "Snapshots",
                    "By outcome, in a second.",
                    Query(
                        f"sum by (outcome) (rate(openrl_trainer_snapshots_total{{{MODEL}}}[{RATE}]))",
                        "{{outcome}}",
                    ),
                    unit="cps",
                ),
                lines(
                    "Runs brought back",
                    "To the device, by where they were, in a second. Many: too few places on the device.",
                    Query(
                        f"sum by (source) (rate(openrl_trainer_loads_total{{{MODEL}}}[{RATE}]))",
                        "from {{source}}",
                    ),
                    unit="cps",
                ),
                lines(
                    "Time to bring a run back",
                    "To the device, by where it was.",
                    *quantiles("openrl_trainer_load_seconds", "source", MODEL),
                    unit="s",
                ),
                lines(
                    "Leases lost",
                    "Runs that another trainer took, since this one was not heard of.",
                    Query(
                        f"sum by (instance) (increase(openrl_trainer_leases_lost_total{{{MODEL}}}[$__range]))", REPLICA
                    ),
                ),
            ),
        ),
    ),
)
