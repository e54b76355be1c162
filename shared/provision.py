"""Streams and buckets as JetStream is told to keep them, made or brought up to date when a process connects.

In a cluster each of them is kept by several servers. The number only ever grows: a process that asks for fewer copies,
such as a command on somebody's desk, changes nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from nats.js import JetStreamContext, api
from nats.js import errors as js_errors

from shared import topology
from shared.errors import UserError
from shared.tables import AWAY
from shared.topology import Bucket, Stream

PATIENCE = 20.0
"""Seconds to wait for servers that are away or have not joined their cluster yet."""
FULL = {10023, 10047, 10077, 10122}
"""JetStream's codes for: insufficient resources, insufficient storage, stream at its size, maximum storage exceeded."""
_TOO_FEW_SERVERS = 10005
_NO_CLUSTER = 10074


async def provide(context: JetStreamContext, replicas: int) -> int:
    """See to it that all streams and buckets are there, and return how many servers keep each of them.

    Raise `UserError` if the servers have no room, are too few, or do not answer.
    """
    wanted = [stream_config(stream) for stream in topology.STREAMS]
    wanted += [bucket_config(bucket) for bucket in topology.BUCKETS]
    give_up = asyncio.get_running_loop().time() + PATIENCE
    kept = [await _provide(context, config.evolve(num_replicas=replicas), give_up) for config in wanted]
    return max(kept)


async def _provide(context: JetStreamContext, config: api.StreamConfig, give_up: float) -> int:
    while True:
        try:
            return (await _made_or_updated(context, config)).config.num_replicas or 1
        except AWAY as error:
            if asyncio.get_running_loop().time() > give_up:
                raise UserError(
                    f"JetStream does not answer ({error}): start nats-server with -js, and all servers of its cluster"
                ) from None
        except js_errors.APIError as error:
            if error.err_code != _TOO_FEW_SERVERS or asyncio.get_running_loop().time() > give_up:
                raise _refusal(config, error) from None
        await asyncio.sleep(0.2)


async def _made_or_updated(context: JetStreamContext, config: api.StreamConfig) -> api.StreamInfo:
    try:
        return await context.add_stream(config)
    except js_errors.BadRequestError as error:
        if error.err_code == _TOO_FEW_SERVERS:
            raise
    # It is there with other settings, from an older version or a smaller cluster: bring it up to date.
    present = (await context.stream_info(config.name or "")).config.num_replicas or 1
    return await context.update_stream(config.evolve(num_replicas=max(present, config.num_replicas or 1)))


def _refusal(config: api.StreamConfig, error: js_errors.APIError) -> Exception:
    if error.err_code in FULL:
        return UserError(
            f"the nats-server has no room for stream {config.name}: the mesh's streams may hold up to "
            f"{topology.MOST_BYTES / 2**30:.1f} GiB together; raise its max_file_store, or free disk"
        )
    if error.err_code in {_TOO_FEW_SERVERS, _NO_CLUSTER}:
        return UserError(
            f"stream {config.name} is to be kept by {config.num_replicas} servers (stream_replicas), and the bus has "
            f"not so many ({error.description}): start the others, or set stream_replicas to what there is"
        )
    return error


def stream_config(stream: Stream) -> api.StreamConfig:
    """A stream as JetStream is told to keep it."""
    return api.StreamConfig(
        name=stream.name,
        subjects=list(stream.subjects),
        retention=api.RetentionPolicy(stream.kept.value),
        max_age=stream.max_age,
        max_bytes=stream.max_bytes,
        discard=api.DiscardPolicy.OLD if stream.drops_oldest else api.DiscardPolicy.NEW,
        duplicate_window=stream.duplicate_window,
        storage=api.StorageType.FILE,
        allow_direct=True,
        republish=api.RePublish(*stream.notices, headers_only=True) if stream.notices else None,
    )


def bucket_config(bucket: Bucket[Any]) -> api.StreamConfig:
    """A KV bucket as NATS defines it (its ADR-8), with a history of one."""
    return api.StreamConfig(
        name=f"KV_{bucket.name}",
        subjects=[f"$KV.{bucket.name}.>"],
        retention=api.RetentionPolicy.LIMITS,
        max_age=bucket.ttl,
        max_msgs_per_subject=1,
        discard=api.DiscardPolicy.NEW,
        duplicate_window=min(bucket.ttl, 120.0) if bucket.ttl else 120.0,
        storage=api.StorageType.FILE,
        allow_direct=True,
        allow_rollup_hdrs=True,
        deny_delete=True,
    )
