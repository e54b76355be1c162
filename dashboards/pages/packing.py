"""GPU packing: what sits on which GPU, how busy GPUs are, and what was decided."""

from __future__ import annotations

from dashboards.model import RATE, Mark, Page, Panel, Query, Row, lines, number, share, stacked

GPU = "{{Hostname}} {{gpu}}"

OVERVIEW = Row(
    "At a glance",
    (
        number("GPUs", "GPUs that give metrics.", Query("openrl:gpus:count", "GPUs"), width=5),
        number("Busy GPUs", "A kernel ran there in the last minute.", Query("openrl:gpus_busy:count", "busy"), width=5),
        number("Jobs running", "Jobs that are driven.", Query("openrl:jobs_running:sum", "jobs"), width=5),
        number(
            "Idle share",
            "Part of all GPU time in which no kernel runs.",
            Query("openrl:gpus_idle:ratio", "idle"),
            unit="percentunit",
            width=5,
        ),
        number(
            "Without room",
            "Replicas that the autoscaler wants and cannot place.",
            Query("sum(openrl_autoscaler_replicas_unmet)", "replicas"),
        ),
        lines(
            "GPUs used against jobs running",
            "Packing is good when jobs rise and GPUs hardly do.",
            Query("openrl:jobs_running:sum", "jobs running"),
            Query("max(openrl_autoscaler_gpus_used)", "GPUs with a replica"),
            Query("openrl:gpus_busy:count", "GPUs busy"),
            Query("openrl:gpus:count", "GPUs"),
            width=16,
        ),
        share(
            "Idle share over time",
            "Part of all GPU time in which no kernel runs.",
            Query("openrl:gpus_idle:ratio", "idle"),
        ),
    ),
)

PLACEMENT = Row(
    "Placement",
    (
        Panel(
            "Which replica sits on which GPU",
            "A line for each replica on a GPU, as the autoscaler placed it; the value is its share of the compute.",
            "percentunit",
            (
                Query(
                    "max by (node, gpu, replica) (openrl_autoscaler_replica_milli) / 1000",
                    "{{node}} {{gpu}} · {{replica}}",
                ),
            ),
            kind="timeline",
            width=24,
            height=10,
            top=1.0,
        ),
        stacked(
            "GPU memory of each replica",
            "As the driver tells it. `(others)` are processes outside of the mesh.",
            Query("sum by (Hostname, gpu, replica) (openrl_gpu_process_memory_bytes)", f"{GPU} · {{{{replica}}}}"),
            unit="bytes",
            width=24,
        ),
    ),
)

GPUS = Row(
    "GPUs",
    (
        share(
            "Utilisation",
            "Part of the time in which a kernel runs, however small it is.",
            Query("openrl:gpu_busy:ratio", GPU),
        ),
        share("Memory in use", "Part of each GPU's memory.", Query("openrl:gpu_memory:ratio", GPU)),
        share(
            "Memory bandwidth in use",
            "Part of the time in which memory is read or written.",
            Query("max by (Hostname, gpu) (DCGM_FI_DEV_MEM_COPY_UTIL) / 100", GPU),
        ),
        lines(
            "Power",
            "A busy GPU that draws little waits for memory or for the host.",
            Query("max by (Hostname, gpu) (DCGM_FI_DEV_POWER_USAGE)", GPU),
            unit="watt",
        ),
        lines(
            "Temperature",
            "When a GPU is too hot, its clocks go down.",
            Query("max by (Hostname, gpu) (DCGM_FI_DEV_GPU_TEMP)", GPU),
            unit="celsius",
        ),
        lines(
            "Power by energy meters",
            "Of all GPUs together: exact also for what happens between two readings.",
            Query(
                f"sum(rate(DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION[{RATE}])) / 1000",
                "all GPUs",
            ),
            unit="watt",
        ),
    ),
)

DECISIONS = Row(
    "Decisions",
    (
        lines(
            "Replicas",
            "Those of each group that start or are ready.",
            Query("max by (group) (openrl_autoscaler_replicas)", "{{group}}"),
        ),
        lines(
            "Wanted",
            "What the autoscaler wants of each group; `openrl plan --explain` says why.",
            Query("max by (group) (openrl_autoscaler_replicas_wanted)", "{{group}}"),
        ),
        lines(
            "Decisions",
            "Starts, drains and moves. Many in a row would be thrash.",
            Query(
                f"sum by (group, decision, cause) (increase(openrl_autoscaler_decisions_total[{RATE}]))",
                "{{group}} {{decision}} {{cause}}",
            ),
        ),
    ),
)

PAGE = Page(
    uid="openrl-packing",
    title="OpenRL / GPU packing",
    description="Which replica sits on which GPU, how busy the GPUs are, and what the autoscaler decided.",
    rows=(OVERVIEW, PLACEMENT, GPUS, DECISIONS),
    marks=(
        Mark(
            "Scaling decisions",
            Query("sum by (group, decision, cause) (increase(openrl_autoscaler_decisions_total[30s])) > 0", ""),
            "{{group}}: {{decision}} ({{cause}})",
        ),
    ),
)
