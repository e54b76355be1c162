"""The switches that a server sets in its clients, with our choice and the reason for it."""

from __future__ import annotations

FLAGS: dict[str, tuple[object, str]] = {
    "pjwt_auth_enabled": (True, "`whoami` reads the token; `exchange_keys` of the gateway turns it off"),
    "parallel_fwdbwd_chunks": (True, "parts of a batch travel together; operations are put in order by number"),
    "proto_compress_fwdbwd": (True, "training data shrink to a tenth; `compress_training_data` turns it off"),
    "sample_use_retrieve_futures": (False, "measured slower; `poll_for_many` turns it on (docs/benchmarks.md)"),
    "sample_join_sampling_session": (True, "copies of a client get numbers that no other copy has"),
    "custom_loss_server_side": (False, "no code of clients runs on the server"),
}
"""What the gateway sets itself. Whatever else a client knows keeps the client's default."""
DYNAMIC: dict[str, tuple[object, str]] = {
    "refresh_interval_sec": (300, "how often a client asks again"),
    "sample_cancel_enabled": (True, "a sample that nobody waits for any more frees its place"),
    "sample_cancel_max_batch_size": (64, ""),
}
LIMITS: tuple[tuple[str, str], ...] = (
    ("rank", "1 to 128; 32 unless given"),
    ("`ttl_seconds`", "3,600 (an hour) to 315,360,000 (ten years)"),
    ("samples of a request", "4,096; the engine's own limit may be lower"),
    ("top-k tables", "128 columns"),
    ("results", "kept for an hour, also for a gateway that was started meanwhile"),
    ("a request's body", "64 MiB, decompressed (`max_body_bytes`)"),
    (
        "runs, requests in flight, queued tokens, checkpoint bytes",
        "of each tenant: `tenant_*` in the configuration of a gateway",
    ),
)
