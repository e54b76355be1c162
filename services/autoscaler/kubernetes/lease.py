"""Which of several autoscalers acts: the one that holds a Lease (coordination.k8s.io/v1).

The protocol of Kubernetes' own controllers. A holder renews; whoever sees that a lease has not been renewed for its
duration, by its own clock, takes it. Every write names the version that it replaces, so of two that take it at the same
time one is refused. A holder that has not renewed for two thirds of the duration stops acting by itself. The client's
own leader election is a loop that starts and cancels work; here work asks, before each write, whether it may go on.
"""

from __future__ import annotations

import logging
import math
import time

from services.autoscaler.kubernetes.api import CONFLICT, LEASES, NOT_FOUND, Api, ApiError
from services.autoscaler.kubernetes.marks import Object, stamp
from shared.errors import TemporaryError

log = logging.getLogger(__name__)


class Lease:
    """See the module's docstring."""

    def __init__(self, api: Api, name: str, identity: str, duration: float) -> None:
        self._api, self._name, self._identity, self._duration = api, name, identity, duration
        self._renewed = float("-inf")
        self._seen: tuple[str, float] = ("", 0.0)
        """The version of the lease that was seen last, and when it was first seen, by our own clock."""

    @property
    def held(self) -> bool:
        """Whether nobody else can have taken it yet."""
        return time.monotonic() - self._renewed < self._duration * 2 / 3

    async def claim(self) -> bool:
        """Take or renew it. False: another one has it."""
        began = time.monotonic()
        try:
            got = await self._renew_or_take()
        except ApiError as error:
            if error.status != CONFLICT:
                raise
            got = False
        if got != self.held:
            log.info("%s %s the lease %s", self._identity, "holds" if got else "does not hold", self._name)
        self._renewed = began if got else float("-inf")
        return got

    async def keep(self) -> None:
        """Renew it if it is time to, during long work. Raise `TemporaryError` if it is no longer held."""
        if not self.held:
            raise TemporaryError(f"{self._identity} no longer holds the lease {self._name}, so it stops acting")
        if time.monotonic() - self._renewed > self._duration / 5 and not await self.claim():
            raise TemporaryError(f"{self._identity} has lost the lease {self._name}, so it stops acting")

    async def release(self) -> None:
        """Let another one lead at once."""
        if not self.held:
            return
        self._renewed = float("-inf")
        lease = await self._api.get(LEASES, self._name)
        if lease["spec"].get("holderIdentity") == self._identity:
            lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": stamp(time.time())}
            await self._api.update(LEASES, self._name, lease)

    async def _renew_or_take(self) -> bool:
        try:
            lease = await self._api.get(LEASES, self._name)
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            await self._api.create(LEASES, self._new())
            return True
        spec = lease.setdefault("spec", {})
        holder = spec.get("holderIdentity") or ""
        if holder not in ("", self._identity) and not self._has_run_out(lease):
            return False
        now = stamp(time.time())
        if holder != self._identity:
            spec |= {"acquireTime": now, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        spec |= {"holderIdentity": self._identity, "leaseDurationSeconds": math.ceil(self._duration), "renewTime": now}
        await self._api.update(LEASES, self._name, lease)
        return True

    def _has_run_out(self, lease: Object) -> bool:
        version, now = lease["metadata"]["resourceVersion"], time.monotonic()
        if self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1] > float(lease["spec"].get("leaseDurationSeconds") or self._duration)

    def _new(self) -> Object:
        now = stamp(time.time())
        return {
            "apiVersion": LEASES.group, "kind": LEASES.kind,
            "metadata": {"name": self._name, "namespace": self._api.namespace},
            "spec": {"holderIdentity": self._identity, "leaseDurationSeconds": math.ceil(self._duration),
                     "acquireTime": now, "renewTime": now, "leaseTransitions": 0},
        }  # fmt: skip
