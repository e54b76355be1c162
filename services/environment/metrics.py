"""Every metric of the environment service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
TURN_BUCKETS = (1, 2, 3, 5, 8, 13, 21, 34, 55)


class EnvironmentMetrics:
    """What this service counts. Labels are names of registered environments, so their number is bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.groups = Counter(
            "openrl_environment_groups_total",
            "Groups by what became of them (played, failed, dropped since their job had ended)",
            ["outcome"],
            registry=registry,
        )
        self.episodes = Counter(
            "openrl_environment_episodes_total",
            "Episodes by what became of them (played, failed, timed_out)",
            ["environment", "outcome"],
            registry=registry,
        )
        self.turns = Histogram(
            "openrl_environment_turns",
            "Turns of an episode",
            ["environment"],
            buckets=TURN_BUCKETS,
            registry=registry,
        )
        self.seconds = Histogram(
            "openrl_environment_episode_seconds",
            "Time of an episode, from asking for its first reply to its end",
            ["environment"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.running = Gauge("openrl_environment_running_groups", "Groups in play", registry=registry)
        self.stuck = Gauge(
            "openrl_environment_stuck_calls",
            "Calls into an environment that were given up and have not come back",
            ["environment"],
            registry=registry,
        )
