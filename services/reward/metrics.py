"""Every metric of the reward service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60)


class RewardMetrics:
    """What this service counts. Labels are names of registered rewards, so their number is bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.groups = Counter(
            "openrl_reward_groups_total",
            "Groups by what became of them (scored, failed, dropped since their job had ended)",
            ["outcome"],
            registry=registry,
        )
        self.episodes = Counter(
            "openrl_reward_episodes_total",
            "Episodes by what became of them (scored, unplayed, failed, timed_out)",
            ["reward", "outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "openrl_reward_seconds",
            "Time to score one episode",
            ["reward"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.running = Gauge("openrl_reward_running_groups", "Groups being scored", registry=registry)
        self.ended = Counter(
            "openrl_reward_processes_ended_total",
            "Scoring processes that hung or crashed and were replaced",
            registry=registry,
        )
