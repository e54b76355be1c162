"""The bus: how full streams are, what waits, what could not be handled; and the processes on it."""

from __future__ import annotations

from dashboards.model import RATE, Page, Query, Row, lines, number, quantiles, share, stacked

PAGE = Page(
    uid="openrl-bus",
    title="OpenRL / Bus",
    description="How full the streams are, what waits in queues, what could not be handled; and the processes.",
    rows=(
        Row(
            "At a glance",
            (
                number(
                    "Dead letters",
                    "Messages given up in the time shown. The stream DEAD has them with their reasons.",
                    Query('max(increase(openrl_bus_stream_published_total{stream="DEAD"}[$__range]))', "messages"),
                    width=6,
                ),
                number(
                    "Bus storage",
                    "Disk that all streams use.",
                    Query("max(openrl_bus_storage_bytes)", "in use"),
                    unit="bytes",
                    width=6,
                ),
                number(
                    "Room for blobs",
                    "Free disk where weights and snapshots lie.",
                    Query("min(openrl_disk_free_bytes)", "free"),
                    unit="bytes",
                    width=6,
                ),
                number(
                    "Age of this",
                    "How long ago a coordinator last looked at the bus.",
                    Query("openrl:bus_look_age_seconds:min", "age"),
                    unit="s",
                    width=6,
                ),
            ),
        ),
        Row(
            "Queues",
            (
                lines(
                    "Waiting",
                    "Messages that nobody has taken: requests to a pool, groups to play, groups to score, operations.",
                    Query("max by (channel, queue) (openrl_queue_waiting)", "{{channel}} {{queue}}"),
                ),
                lines(
                    "In work",
                    "Messages given out and not acknowledged.",
                    Query("max by (channel, queue) (openrl_queue_in_work)", "{{channel}} {{queue}}"),
                ),
                lines(
                    "Longest wait",
                    "How long the oldest message has been there.",
                    Query("max by (channel, queue) (openrl_queue_oldest_seconds)", "{{channel}} {{queue}}"),
                    unit="s",
                ),
                stacked(
                    "Messages handled",
                    "By what became of them, in a second.",
                    Query(
                        f"sum by (channel, outcome) (rate(openrl_worker_messages_total[{RATE}]))",
                        "{{channel}} {{outcome}}",
                    ),
                    unit="cps",
                ),
                lines(
                    "Messages in handlers",
                    "As the replicas themselves say.",
                    Query("sum by (channel) (openrl_worker_running)", "{{channel}}"),
                ),
                lines("Time in handlers", "By channel.", *quantiles("openrl_worker_seconds", "channel"), unit="s"),
            ),
        ),
        Row(
            "Streams",
            (
                lines(
                    "Published",
                    "Messages in a second.",
                    Query(
                        f'max by (stream) (rate(openrl_bus_stream_published_total{{stream!~"KV_.*"}}[{RATE}]))',
                        "{{stream}}",
                    ),
                    unit="cps",
                ),
                lines(
                    "Messages",
                    "That lie in each stream.",
                    Query('max by (stream) (openrl_bus_stream_messages{stream!~"KV_.*"})', "{{stream}}"),
                ),
                stacked(
                    "Size",
                    "Bytes of each stream.",
                    Query('max by (stream) (openrl_bus_stream_bytes{stream!~"KV_.*"})', "{{stream}}"),
                    unit="bytes",
                ),
                share(
                    "Fill",
                    "Part of what a stream may hold. Those that drop their oldest messages may be full.",
                    Query(
                        "max by (stream) (openrl_bus_stream_bytes)"
                        " / (max by (stream) (openrl_bus_stream_limit_bytes) > 0)",
                        "{{stream}}",
                    ),
                ),
                stacked(
                    "Size of buckets",
                    "Bytes of each key-value bucket.",
                    Query('max by (stream) (openrl_bus_stream_bytes{stream=~"KV_.*"})', "{{stream}}"),
                    unit="bytes",
                ),
                lines(
                    "Disk",
                    "What all streams use and may use, and what is free for blobs.",
                    Query("max(openrl_bus_storage_bytes)", "streams"),
                    Query("max(openrl_bus_storage_limit_bytes)", "limit of the streams"),
                    Query("min by (place) (openrl_disk_free_bytes)", "free for {{place}}"),
                    unit="bytes",
                ),
            ),
        ),
        Row(
            "Processes",
            (
                lines(
                    "Processor",
                    "Cores that each process uses.",
                    Query(f"rate(process_cpu_seconds_total[{RATE}])", "{{instance}}"),
                ),
                lines(
                    "Memory",
                    "Resident, of each process.",
                    Query("process_resident_memory_bytes", "{{instance}}"),
                    unit="bytes",
                ),
                lines(
                    "Scraped",
                    "1: it gives metrics; 0: it does not answer.",
                    Query('up{job=~"openrl.*|gpu"}', "{{instance}}"),
                    top=1.0,
                ),
            ),
        ),
    ),
)
