"""How a process can be watched: JSON logs with the ids of what is being worked on, metrics, health, trace context.

Trace context travels in message headers (W3C `traceparent`, through opentelemetry's API). Without an OpenTelemetry
SDK in the process the ids are still made and passed on, so that logs of one request can be joined across services.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import Any

from aiohttp import web
from opentelemetry import context as trace_context
from opentelemetry import propagate, trace
from prometheus_client import GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.aiohttp import make_aiohttp_handler

from shared.errors import UserError
from shared.metrics import Registry

log = logging.getLogger(__name__)

IDS = ("job", "group", "run", "request", "policy")
"""Ids that a log line may also be given by itself: `log.info("…", extra={"run": name})`."""
SECONDS = "seconds"
"""What a log line may also be given: how long parts of something took, by name."""
_bound: ContextVar[Mapping[str, str]] = ContextVar("bound", default=MappingProxyType({}))


@contextmanager
def bound(**ids: str) -> Iterator[None]:
    """Put ids (job, run, request, …) into every log line that is written inside."""
    reset = _bound.set({**_bound.get(), **ids})
    try:
        yield
    finally:
        _bound.reset(reset)


class Stopwatch:
    """How long the parts of something took, one after the other, for the log."""

    def __init__(self) -> None:
        self.seconds = {"began": time.time()}
        """`began` is a wall-clock time, so that what several processes did can be put together."""
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """What was done since the last call has this name."""
        now = time.monotonic()
        self.seconds[name] = now - self._last
        self._last = now


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, replica, logger, message, ids, seconds, trace, error."""

    def __init__(self, service: str, replica: str) -> None:
        super().__init__()
        self._fixed = {"service": service, "replica": replica}

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self._fixed,
            "logger": record.name,
            "message": record.getMessage(),
            **_bound.get(),
            **{name: str(record.__dict__[name]) for name in IDS if name in record.__dict__},
        }
        if parts := record.__dict__.get(SECONDS):
            line[SECONDS] = {name: round(value, 6) for name, value in parts.items()}
        if (span := trace.get_current_span().get_span_context()).is_valid:
            line["trace"] = f"{span.trace_id:032x}"
        if record.exc_info and record.exc_info[0]:
            line["error"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line)


def log_as_json(service: str, replica: str, level: str) -> None:
    """Send all logs of this process to standard error as JSON. Raise `UserError` for an unknown level."""
    if level.upper() not in logging.getLevelNamesMapping():
        raise UserError(f"log_level {level!r} is unknown: use debug, info, warning or error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service, replica))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def log_what_nobody_caught() -> None:
    """Write an error that ends the process, or a thread, and warnings as log entries rather than as bare text."""

    def ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return
        log.critical("%s: %s", kind.__qualname__, error, exc_info=(kind, error, trace))

    def thread_ended(arguments: threading.ExceptHookArgs) -> None:
        error = arguments.exc_value
        log.error("thread %s ended by an error", arguments.thread and arguments.thread.name, exc_info=error)

    sys.excepthook = ended
    threading.excepthook = thread_ended
    logging.captureWarnings(True)


def trace_headers() -> dict[str, str]:
    """Headers that carry the present trace, or begin one."""
    context = trace_context.get_current()
    if not trace.get_current_span().get_span_context().is_valid:
        context = trace.set_span_in_context(_new_span())
    headers: dict[str, str] = {}
    propagate.inject(headers, context)
    return headers


@contextmanager
def traced(headers: Mapping[str, str]) -> Iterator[None]:
    """Go on, inside, with the trace that a message brought."""
    reset = trace_context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        trace_context.detach(reset)


def _new_span() -> trace.Span:
    return trace.NonRecordingSpan(
        trace.SpanContext(
            trace_id=secrets.randbits(128),
            span_id=secrets.randbits(64),
            is_remote=False,
            trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
        )
    )


class Telemetry:
    """Metrics and health of one service: `/metrics`, `/healthz` (can it work?), `/livez` (would a restart help?)."""

    def __init__(self, service: str, replica: str) -> None:
        self.registry = Registry()
        """A registry of its own, so that several services fit into one process."""
        self.healthy: Callable[[], str | None] = lambda: "starting"
        """Says what is wrong; None: nothing. A bus that is away is wrong."""
        self.alive: Callable[[], str | None] = lambda: None
        """Says what only a new process would mend. A bus that is away is not that: all services would be restarted."""
        self._names = {"service": service, "replica": replica}
        self._runner: web.AppRunner | None = None
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    async def serve(self, host: str, port: int) -> int:
        """Listen, and return the port. Raise `UserError` if it is taken."""
        app = web.Application()
        app.router.add_get("/metrics", make_aiohttp_handler(self.registry))
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/livez", self._life)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self.close()
            raise UserError(f"port {port} on {host} cannot be used ({error.strerror}): set metrics_port") from None
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _: web.Request) -> web.Response:
        return self._verdict(self.healthy())

    async def _life(self, _: web.Request) -> web.Response:
        return self._verdict(self.alive())

    def _verdict(self, problem: str | None) -> web.Response:
        body = {**self._names, "status": problem or "ok"}
        return web.json_response(body, status=503 if problem else 200)
