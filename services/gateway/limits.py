"""What each tenant has in flight at this gateway, and whether there is room for more. Pure.

Counted where it was submitted, so with several gateways behind one address a tenant has up to as many times its limits.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.contracts.tenants import TenantLimits


@dataclass
class Load:
    """What a tenant has in flight."""

    requests: int = 0
    tokens: int = 0


class InFlight:
    """Requests that have been submitted and not answered."""

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}
        self._requests: dict[str, tuple[str, int]] = {}

    def refusal(self, tenant: str, limits: TenantLimits, tokens: int) -> str | None:
        """Why a tenant may not submit a request of so many tokens now; None: it may.

        A single request is never too large: whoever has nothing in flight may submit it.
        """
        load = self._loads.get(tenant)
        if load is None or not load.requests:
            return None
        if limits.requests is not None and load.requests >= limits.requests:
            return f"{tenant} has {load.requests} requests in flight and may have {limits.requests}"
        if limits.queued_tokens is not None and load.tokens + tokens > limits.queued_tokens:
            return f"{tenant} has {load.tokens} tokens in flight and may have {limits.queued_tokens}"
        return None

    def add(self, request: str, tenant: str, tokens: int) -> None:
        """A request was submitted; once more makes no difference."""
        if request in self._requests:
            return
        self._requests[request] = (tenant, tokens)
        load = self._loads.setdefault(tenant, Load())
        load.requests += 1
        load.tokens += tokens

    def remove(self, request: str) -> None:
        """It was answered, or given up."""
        found = self._requests.pop(request, None)
        if found is None:
            return
        tenant, tokens = found
        load = self._loads[tenant]
        load.requests -= 1
        load.tokens -= tokens
        if not load.requests:
            del self._loads[tenant]

    def load(self, tenant: str) -> Load:
        """What a tenant has in flight."""
        return self._loads.get(tenant, Load())

    def __contains__(self, request: str) -> bool:
        return request in self._requests

    def __len__(self) -> int:
        return len(self._requests)
