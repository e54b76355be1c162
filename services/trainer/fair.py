"""Fair passes: deficit round-robin over tenants, datum by datum. Pure.

Deficit round-robin is Shreedhar and Varghese 1996, "Efficient fair queuing using deficit round-robin", IEEE/ACM
Transactions on Networking 4(3). Tenants are visited in a ring. At each visit tenant i is granted a quantum

    q_i = budget * w_i / sum of w over the tenants that have something waiting

tokens, so one round of the ring grants one pass, and is served. What it does not use stays as its credit. As in surplus
round-robin (Adiseshu, Parulkar and Varghese 1996) it pays afterwards: it is served while its credit is above zero, and
the last datum may bring it below. So a small operation of a tenant that was idle goes at its first visit, and credit
stays above minus two of the largest data; over any time in which tenants i and j both have something waiting that
fits, their tokens divided by their weights differ by a bounded amount, however many runs each has.

Three rules come with passes:
- A pass goes on until nothing that waits fits into what is left of it. Room that only tenants in debt could use costs
  them nothing.
- A datum whose turn comes and that does not fit goes first into a later pass; those passed over longest go first. So
  large data are never kept out by small ones. A datum larger than the budget gets a pass of its own.
- A tenant that comes back is visited next. One that goes idle loses its credit but not its debt, so that nobody gains
  by coming and going.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Neighbouring data of a run's head that go into one pass."""

    run: str
    first: int
    """Index of the first datum."""
    stop: int
    """Index behind the last."""
    last: bool
    """Whether the operation is done with it."""


class _Filling:
    """A pass while it is filled: what waits in each run's head, and how much of it is taken."""

    def __init__(self, budget: int, sizes: Mapping[str, Sequence[int]], begun: Mapping[str, int]) -> None:
        self.room = budget
        self._sizes = sizes
        self._begun = begun
        self._taken: dict[str, int] = {}
        """Index behind the last datum taken, of each run that is in the pass."""
        self._open = dict.fromkeys(sizes)
        """Runs that may still fit: room only becomes less, so a run that does not fit never will."""

    def rest(self, run: str) -> int | None:
        """Tokens of the run's next datum; None: its head is in the pass to the end."""
        place = self._taken.get(run, self._begun[run])
        return self._sizes[run][place] if place < len(self._sizes[run]) else None

    def fits(self, run: str) -> bool:
        """Whether the run's next datum can go in. Into an empty pass goes any."""
        size = self.rest(run)
        return size is not None and (size <= self.room or not self._taken)

    def goes_on(self) -> bool:
        """Whether anything that waits fits."""
        for run in list(self._open):
            if self.fits(run):
                return True
            del self._open[run]
        return False

    def take(self, run: str) -> int:
        """Put the run's next datum in, and return its tokens."""
        size = self.rest(run)
        assert size is not None
        self._taken[run] = self._taken.get(run, self._begun[run]) + 1
        self.room -= size
        return size

    def pieces(self) -> tuple[Piece, ...]:
        """What the pass holds."""
        return tuple(
            Piece(run, self._begun[run], stop, last=stop == len(self._sizes[run])) for run, stop in self._taken.items()
        )


class FairPasses:
    """Fills passes, and remembers who is owed what."""

    def __init__(self, budget: int, weights: Mapping[str, float]) -> None:
        self._budget = budget
        self._weights = weights
        self._ring: deque[str] = deque()
        self._credit: dict[str, float] = {}
        self._in_turn = ""
        """Tenant whose visit the last pass broke off: it has its quantum already."""
        self._passed_over: dict[str, None] = {}
        """Runs whose turn came when there was no room, longest waiting first, at most one of each tenant."""
        self._served: dict[str, int] = {}
        """When each run was last served, by a count: in a tenant, runs are served in turn."""
        self._count = 0

    def next_pass(
        self, tenants: Mapping[str, str], sizes: Mapping[str, Sequence[int]], begun: Mapping[str, int]
    ) -> tuple[Piece, ...]:
        """Fill one pass from what waits, which is never nothing.

        `tenants`, `sizes` (tokens of each datum of the head) and `begun` (data that are done) are by run.
        """
        filling = _Filling(self._budget, sizes, begun)
        runs: dict[str, list[str]] = {}
        for run, tenant in tenants.items():
            runs.setdefault(tenant, []).append(run)
        self._update_ring(runs)
        self._take_passed_over(filling, tenants)
        while filling.goes_on():
            self._round(filling, runs)
        return filling.pieces()

    def forget(self, run: str) -> None:
        """The run has gone."""
        self._served.pop(run, None)
        self._passed_over.pop(run, None)

    def _quantum(self, tenant: str, runs: Mapping[str, object]) -> float:
        total = sum(self._weights.get(each, 1.0) for each in runs)
        return self._budget * self._weights.get(tenant, 1.0) / total

    def _update_ring(self, runs: Mapping[str, object]) -> None:
        """Let idle tenants without debts go, and those that come back in, to be visited next."""
        for tenant in [tenant for tenant in self._ring if tenant not in runs]:
            self._credit[tenant] = min(0.0, self._credit[tenant])
            if not self._credit[tenant]:
                self._ring.remove(tenant)
                del self._credit[tenant]
        for tenant in runs:
            if tenant not in self._credit:
                self._ring.appendleft(tenant)
                self._credit[tenant] = 0.0

    def _take_passed_over(self, filling: _Filling, tenants: Mapping[str, str]) -> None:
        """Begin with the datum that was passed over longest, whatever its tenant's credit is by now."""
        self._passed_over = dict.fromkeys(run for run in self._passed_over if run in tenants)
        if self._passed_over:
            run = next(iter(self._passed_over))
            self._take(filling, run, tenants[run])

    def _take(self, filling: _Filling, run: str, tenant: str) -> None:
        self._credit[tenant] -= filling.take(run)
        self._passed_over.pop(run, None)
        self._count += 1
        self._served[run] = self._count

    def _round(self, filling: _Filling, runs: Mapping[str, list[str]]) -> None:
        """Visit every tenant once, or until nothing fits any more."""
        before = filling.room
        for _ in range(len(self._ring)):
            tenant = self._ring[0]
            if tenant != self._in_turn:
                self._grant(tenant, runs, 1)
            self._in_turn = ""
            self._serve(filling, tenant, runs.get(tenant, []))
            full = not filling.goes_on()
            if full and self._credit[tenant] > 0:
                self._in_turn = tenant
                return
            self._ring.rotate(-1)
            if full:
                return
        if filling.room == before:
            self._give_away(filling, runs)

    def _grant(self, tenant: str, runs: Mapping[str, object], rounds: int) -> None:
        """Credit is at most a pass: what cannot be used for want of room is not saved up without end."""
        granted = self._credit[tenant] + rounds * self._quantum(tenant, runs)
        self._credit[tenant] = min(granted, float(self._budget) if tenant in runs else 0.0)

    def _serve(self, filling: _Filling, tenant: str, runs: Sequence[str]) -> None:
        """Take data of a tenant's runs, the run served longest ago first, while its credit lasts."""
        in_turn = sorted(runs, key=lambda run: self._served.get(run, 0))
        for run in in_turn:
            while self._credit[tenant] > 0 and filling.fits(run):
                self._take(filling, run, tenant)
            left = self._credit[tenant] > 0 and filling.rest(run) is not None
            # At its turn, before runs that fit spend the credit: they might do so every time.
            if left and not any(each in self._passed_over for each in runs):
                self._passed_over[run] = None

    def _give_away(self, filling: _Filling, runs: Mapping[str, list[str]]) -> None:
        """Serve a datum that fits although its tenant is in debt, to whoever would be out of debt first.

        It costs nothing: nobody else could use the room. If it did, small data of one run would keep the tenant in debt
        for ever, and its runs of large data waiting.
        """
        fitting = {tenant: [run for run in own if filling.fits(run)] for tenant, own in runs.items()}
        debts = {tenant: -self._credit[tenant] / self._quantum(tenant, runs) for tenant, own in fitting.items() if own}
        tenant = min(debts, key=lambda each: debts[each])
        run = min(fitting[tenant], key=lambda each: self._served.get(each, 0))
        self._credit[tenant] += filling.rest(run) or 0
        self._take(filling, run, tenant)
