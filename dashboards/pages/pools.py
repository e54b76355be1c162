"""Pools: what waits for samplers, and what samplers do."""

from __future__ import annotations

from dashboards.by_model import CALLED, MODEL, recorded
from dashboards.model import RATE, Choice, Page, Query, Row, lines, quantiles, share, stacked

PAGE = Page(
    uid="openrl-pools",
    title="OpenRL / Pools",
    description="What waits for the samplers of each base model, and what they do.",
    choices=(Choice("base_model", "Base model", "openrl:pool_queued_requests:max", "base_model"),),
    rows=(
        Row(
            "Load",
            (
                lines("Requests in the queue", "Nobody has taken them yet.", recorded("pool_queued_requests:max")),
                lines(
                    "Longest wait in the queue",
                    "How long the oldest request has been there.",
                    recorded("pool_oldest_seconds:max"),
                    unit="s",
                ),
                lines("Replicas", "Samplers that give metrics.", recorded("pool_replicas:count")),
                stacked(
                    "Sequences",
                    "What all samplers generate, what waits in them, and what waits in the queue: the demand.",
                    recorded("pool_sequences_running:sum", f"{CALLED} running"),
                    recorded("pool_sequences_waiting:sum", f"{CALLED} waiting"),
                    recorded("pool_queued_sequences:max", f"{CALLED} queued"),
                ),
                share(
                    "Places in use",
                    "Sequences being generated, of those that all samplers could.",
                    Query(
                        f"openrl:pool_sequences_running:sum{{{MODEL}}} / openrl:pool_sequence_slots:sum{{{MODEL}}}",
                        CALLED,
                    ),
                ),
                lines(
                    "Demand in the autoscaler's windows",
                    "It decides by the long one, and by the short one when load jumps.",
                    recorded("pool_sequences_wanted:avg6s", f"{CALLED} 6 s"),
                    recorded("pool_sequences_wanted:avg1m", f"{CALLED} 1 min"),
                ),
            ),
        ),
        Row(
            "Work",
            (
                stacked(
                    "Tokens",
                    "In a second: computed of prompts, and sampled.",
                    Query(
                        f"sum by (base_model, what) (rate(openrl_sampler_tokens_total{{{MODEL}}}[{RATE}]))",
                        f"{CALLED} {{{{what}}}}",
                    ),
                ),
                share(
                    "Key-value cache",
                    "Part in use, by replica. When it is full, sequences wait.",
                    Query(f"openrl_sampler_kv_cache_ratio{{{MODEL}}}", "{{instance}}"),
                ),
                share("Duty", "Part of the time in which a sampler has any request.", recorded("pool_duty:avg1m")),
                lines(
                    "Sequences finished",
                    "In a second.",
                    recorded("pool_sequences_finished:rate1m"),
                    unit="cps",
                ),
                lines(
                    "Oldest request in work",
                    "How long it has been in its sampler, by replica.",
                    Query(f"openrl_sampler_oldest_request_seconds{{{MODEL}}}", "{{instance}}"),
                    unit="s",
                ),
                lines(
                    "Wait inside of the sampler",
                    "From arrival to the first computation.",
                    *quantiles("openrl_sampler_queue_seconds", "base_model", MODEL),
                    unit="s",
                ),
            ),
        ),
        Row(
            "Policies",
            (
                lines(
                    "Policies in memory",
                    "Adapters loaded, and places for them, by replica. When more are asked for, they take turns.",
                    Query(f"openrl_sampler_policies_loaded{{{MODEL}}}", "{{instance}} loaded"),
                    Query(f"openrl_sampler_policy_slots{{{MODEL}}}", "{{instance}} places"),
                ),
                lines(
                    "Time to load a policy",
                    "Fetching and loading, without the wait for a place.",
                    *quantiles("openrl_sampler_policy_load_seconds", "base_model", MODEL),
                    unit="s",
                ),
                lines(
                    "Requests given up",
                    "By whoever asked, in a second.",
                    Query(
                        f"sum by (base_model) (rate(openrl_sampler_abandoned_total{{{MODEL}}}[{RATE}]))",
                        CALLED,
                    ),
                    unit="cps",
                ),
            ),
        ),
    ),
)
