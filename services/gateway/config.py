"""Configuration of a gateway."""

from __future__ import annotations

from shared.config import ServiceConfig

MIB = 1 << 20


class GatewayConfig(ServiceConfig, frozen=True, kw_only=True):
    """One gateway. It keeps nothing: any number of them may serve the same mesh."""

    port: int = 8470
    """Where clients connect, on `host`. 0: a free one."""
    secret_file: str = ""
    """File with the secret that signs short-lived tokens and download links, the same for all gateways of a mesh.
    Empty: a secret that they share on the bus, where whoever may read the bus sees it."""
    public_url: str = ""
    """How clients reach the gateway, for links. Empty: as the request for the link came."""
    local_files: bool = True
    """Name tokenizers by the directory of the model, which clients on the same machine can read. Otherwise by the
    model's name, which clients look up on the hub."""

    max_body_bytes: int = 64 * MIB
    """Of a request, decompressed. Clients cut training data into requests of about 5 MB; a single datum may be more."""
    poll_seconds: float = 30.0
    """How long a poll for a result that is not there yet is held. Clients give up after 45 s."""
    head_seconds: float = 20.0
    """How long a client may take to send the head of a request."""
    body_seconds: float = 60.0
    """How long a client may take to send the body."""
    max_connections: int = 16_384
    """At the same time; a client that waits for 2,000 samples has 2,000."""
    cached_result_bytes: int = 256 * MIB
    """Results in memory that nobody has asked for yet; the rest is read from the bus when asked for."""
    session_idle_seconds: float = 120.0
    """How long results of a session that asks nothing are listened for."""

    tenant_runs: int = 1_000
    """Open runs of a tenant, unless its record says otherwise; so for each of the next."""
    tenant_requests: int = 20_000
    """Operations and samples of a tenant at this gateway that are not answered yet."""
    tenant_queued_tokens: int = 50_000_000
    """Tokens in these."""
    tenant_checkpoint_bytes: int = 1 << 40
    """Of all checkpoints of a tenant."""

    compress_training_data: bool = True
    """Have clients compress training data: it shrinks to a tenth, at little cost on either side."""
    poll_for_many: bool = False
    """Have sampling clients wait with one poll for all samples, rather than one each. See docs/benchmarks.md."""
    exchange_keys: bool = True
    """Have clients exchange their key for a short-lived token, which costs them a request at the start and every few
    minutes. Without it they cannot tell who they are (`whoami`), since they read that from the token."""
