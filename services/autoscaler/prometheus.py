"""Asks Prometheus."""

from __future__ import annotations

import logging
import time

import aiohttp
import msgspec

from services.autoscaler.readings import SELECTOR, Answered, Series

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3.0


class Prometheus:
    """A client for one query. Use as an async context manager, or `close` it."""

    def __init__(self, url: str, window: float) -> None:
        """`window`: seconds back from now in which samples are of interest."""
        self._url = f"{url.rstrip('/')}/api/v1/query"
        self._query = f"{SELECTOR}[{max(1, round(window))}s]"
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS))
        self._decoder = msgspec.json.Decoder(Answered)
        self._silent = ""

    async def close(self) -> None:
        """Close its connections."""
        await self._http.close()

    async def read(self) -> tuple[list[Series], float] | None:
        """All series, and the time that was asked for. None: it does not answer, or not as it should."""
        now = time.time()
        try:
            async with self._http.get(self._url, params={"query": self._query, "time": f"{now:.3f}"}) as answer:
                body = await answer.read()
                answer.raise_for_status()
            found = self._decoder.decode(body).data.result
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError) as error:
            self._say(f"{type(error).__name__}: {error}")
            return None
        self._say("")
        return found, now

    def _say(self, problem: str) -> None:
        """Log a silence once, and its end."""
        if bool(problem) != bool(self._silent):
            if problem:
                log.warning("Prometheus does not answer at %s, so all groups are held: %s", self._url, problem)
            else:
                log.info("Prometheus answers again at %s", self._url)
        self._silent = problem
