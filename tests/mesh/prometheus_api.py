"""Asks a Prometheus, for tests."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from services.local.prometheus import find_binary
from shared.errors import UserError


def need_prometheus() -> None:
    """Skip the test, with the way out as the reason, where there is none."""
    try:
        find_binary("prometheus")
    except UserError as error:
        pytest.skip(str(error))


class Api:
    """Prometheus at an address."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """What an instant query gives: samples with `metric` and `value`. A wrong query fails the test."""
        return await self._get("/api/v1/query", query=expression)

    async def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The same over time: series with `metric` and `values`."""
        return await self._get("/api/v1/query_range", query=expression, start=start, end=end, step=step)

    async def _get(self, path: str, **parameters: Any) -> list[dict[str, Any]]:
        async with aiohttp.ClientSession() as http, http.get(self._url + path, params=parameters) as answer:
            body = await answer.json()
        assert body["status"] == "success", f"{parameters}: {body}"
        found: list[dict[str, Any]] = body["data"]["result"]
        return found
