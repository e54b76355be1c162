"""Jobs: do they learn, how fast, and what do they wait for."""

from __future__ import annotations

from dashboards.model import RATE, Choice, Page, Query, Row, lines, number, quantiles, stacked

JOB = 'job_id=~"$job_id"'


def of_job(metric: str) -> Query:
    """A gauge, by job. Of two coordinators only one drives it."""
    return Query(f"max by (job_id) ({metric}{{{JOB}}})", "{{job_id}}")


PAGE = Page(
    uid="openrl-jobs",
    title="OpenRL / Jobs",
    description="Whether jobs learn, how fast they go, and what they wait for.",
    choices=(Choice("job_id", "Job", "openrl_job_step", "job_id"),),
    rows=(
        Row(
            "At a glance",
            (
                number("Running", "Jobs that are driven.", Query("openrl:jobs_running:sum", "jobs"), width=6),
                number(
                    "Queued",
                    "Jobs that wait for a coordinator with room.",
                    Query('max(openrl_jobs_open{phase="queued"})', "jobs"),
                    width=6,
                ),
                number(
                    "Paused",
                    "Jobs paused by their owners.",
                    Query('max(openrl_jobs_open{phase="paused"})', "jobs"),
                    width=6,
                ),
                number(
                    "Failed",
                    "In the time shown. `openrl status` has the reasons.",
                    Query('sum(increase(openrl_jobs_finished_total{phase="failed"}[$__range]))', "jobs"),
                    width=6,
                ),
            ),
        ),
        Row(
            "Learning",
            (
                lines("Reward", "Mean reward of each step's groups.", of_job("openrl_job_reward"), bottom=None),
                lines(
                    "Held-out accuracy",
                    "Mean reward of tasks that are never trained on.",
                    of_job("openrl_job_held_out_accuracy"),
                    bottom=None,
                ),
                lines("Steps done", "Optimizer steps.", of_job("openrl_job_step")),
                lines(
                    "Staleness",
                    "Optimizer steps between the weights that sampled and those that are trained.",
                    of_job("openrl_job_staleness_steps"),
                ),
                lines(
                    "Mismatch",
                    "Mean difference of trainer's and sampler's log-probabilities: same tokens, same weights. "
                    "It should be noise.",
                    of_job("openrl_job_logprob_mismatch"),
                ),
                stacked(
                    "Groups",
                    "Trained; skipped since all rewards are equal; dropped as too old. In a second.",
                    Query(
                        f"sum by (outcome) (rate(openrl_job_groups_total{{{JOB}}}[{RATE}]))",
                        "{{outcome}}",
                    ),
                    unit="cps",
                ),
            ),
        ),
        Row(
            "Speed",
            (
                lines(
                    "Sampled tokens",
                    "In a second, of groups that were used.",
                    Query(
                        f"sum by (job_id) (rate(openrl_job_sampled_tokens_total{{{JOB}}}[{RATE}]))",
                        "{{job_id}}",
                    ),
                ),
                lines(
                    "Time of a step",
                    "From step to step, on average.",
                    Query(
                        f"sum by (job_id) (rate(openrl_job_step_seconds_sum{{{JOB}}}[{RATE}]))"
                        f" / (sum by (job_id) (rate(openrl_job_step_seconds_count{{{JOB}}}[{RATE}])) > 0)",
                        "{{job_id}}",
                    ),
                    unit="s",
                ),
                stacked(
                    "What steps wait for",
                    "Part of the time in which a job's step waits for groups, and for the trainer.",
                    Query(
                        f"sum by (phase) (rate(openrl_job_phase_seconds_total{{{JOB}}}[{RATE}]))"
                        f" / scalar(sum(rate(openrl_job_phase_seconds_total{{{JOB}}}[{RATE}])) > 0)",
                        "{{phase}}",
                    ),
                    unit="percentunit",
                ),
            ),
        ),
        Row(
            "Playing and scoring",
            (
                stacked(
                    "Episodes",
                    "By what became of them, in a second.",
                    Query(
                        f"sum by (environment, outcome) (rate(openrl_environment_episodes_total[{RATE}]))",
                        "{{environment}} {{outcome}}",
                    ),
                    unit="cps",
                ),
                lines(
                    "Time of an episode",
                    "From asking for its first reply to its end.",
                    *quantiles("openrl_environment_episode_seconds", "environment"),
                    unit="s",
                ),
                lines(
                    "Turns of an episode",
                    "On average.",
                    Query(
                        f"sum by (environment) (rate(openrl_environment_turns_sum[{RATE}]))"
                        f" / (sum by (environment) (rate(openrl_environment_turns_count[{RATE}])) > 0)",
                        "{{environment}}",
                    ),
                ),
                stacked(
                    "Scores",
                    "By what became of them, in a second.",
                    Query(
                        f"sum by (reward, outcome) (rate(openrl_reward_episodes_total[{RATE}]))",
                        "{{reward}} {{outcome}}",
                    ),
                    unit="cps",
                ),
                lines("Time to score", "One episode.", *quantiles("openrl_reward_seconds", "reward"), unit="s"),
                lines(
                    "Replaced scoring processes",
                    "They hung or crashed, by somebody's reward.",
                    Query("sum(increase(openrl_reward_processes_ended_total[$__range]))", "processes"),
                ),
            ),
        ),
    ),
)
