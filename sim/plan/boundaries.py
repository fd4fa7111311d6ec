"""Where request rates stop to pass, where they begin to fail, and where they saturate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from servecast.sim.metrics.knee import ends
from servecast.sim.plan.prober import ProbedRate, Prober
from servecast.sim.plan.search import near_enough, readable, search

PlanState = Literal["found", "inconclusive", "infeasible", "unbounded"]
Progress = Callable[[float, str, float], None]

CLOSER = 3  # at most so many halvings of a bracket beyond the tolerance
ALONE = 0.05  # mean requests in flight below which a request has the server to itself


def _passes(probe: ProbedRate) -> bool:
    return probe.state == "pass"


def _does_not_fail(probe: ProbedRate) -> bool:
    return probe.state != "fail"


@dataclass(frozen=True, slots=True)
class Found:
    """best: the largest rate that passes, with none below it that does not. miss: the smallest that does not
    pass. fail: the smallest that fails."""

    best: ProbedRate | None
    miss: ProbedRate | None
    fail: ProbedRate | None

    @classmethod
    def of(cls, probes: Sequence[ProbedRate]) -> Found:
        """Read off probes that rise by rate."""
        miss = next((probe for probe in probes if probe.state != "pass"), None)
        fail = next((probe for probe in probes if probe.state == "fail"), None)
        best = next((probe for probe in reversed(probes) if miss is None or probe.rate < miss.rate), None)
        return cls(best, miss, fail)

    def state(self, tolerance: float) -> PlanState:
        """See `capacity.Plan`."""
        if self.miss is None:
            return "unbounded"
        if self.best is None:
            return "infeasible" if self.miss.state == "fail" else "inconclusive"
        if self.fail is None:
            return "inconclusive"
        low, high = self.best.rate, self.fail.rate
        nothing_between = not low < readable(math.sqrt(low * high)) < high
        return "found" if near_enough(low, high, 1 + tolerance) or nothing_between else "inconclusive"


@dataclass(slots=True)
class Boundaries:
    """Finds where rates stop to pass, begin to fail, and saturate: each from what is known of the others.

    max_rate: where doubling ends. progress: see `capacity.plan`.
    """

    prober: Prober
    max_rate: float
    progress: Progress | None
    _done: float = 0.0

    def find(self, start_rate: float, *, knee: bool = True) -> None:
        """All three, from a first guess; the last only where the knee is asked for."""
        halvings = self._halvings(1.0, 2.0)
        self._find(_passes, later=2 * halvings, first=min(start_rate, self.max_rate))
        if self.prober.probes[0].state == "pass":
            self._find(_does_not_fail, later=halvings)
            self._close_in(later=halvings)
        if knee:
            self._find(lambda probe: not probe.saturated, knee=True)

    def _close_in(self, *, later: int) -> None:
        """Look closer at both sides of undecided rates that are themselves within the tolerance."""
        tolerance = self.prober.effort.tolerance
        for holds in (_passes, _does_not_fail) * CLOSER:
            found = Found.of(self.prober.probes)
            if found.best is None or found.fail is None or found.state(tolerance) == "found":
                return
            low, high = found.best.rate, found.fail.rate
            undecided = [rate for rate in self.prober.found if low < rate < high]  # one, at least
            near = math.sqrt((1 + tolerance) * min(undecided) / max(undecided))
            if near < (1 + tolerance) ** 0.5**CLOSER:
                return
            self._find(holds, near=near, later=later)

    def _find(
        self,
        holds: Callable[[ProbedRate], bool],
        *,
        first: float | None = None,
        near: float | None = None,
        later: int = 0,
        knee: bool = False,
    ) -> None:
        """Bracket the smallest rate that does not hold.

        Args:
            first: guess of the first boundary, which is looked for downwards, too, until a request has the
                server to itself; the others lie above. near: see `search`; 1 + the tolerance without it.
            later: probes that are expected after this boundary. knee: see `Prober.at`.
        """
        tried = {probe.rate: holds(probe) for probe in self.prober.probes}

        def report(rate: float, state: str) -> None:
            if self.progress is not None:
                known = len(self.prober.found)
                left = self._halvings(*ends(tried)) + later
                self._done = max(self._done, known / (known + left) if known else 0.0)
                self.progress(rate, state, self._done)

        def at(rate: float) -> bool | None:
            if tried and rate < min(tried):
                lowest = self.prober.found[min(tried)]
                if first is None or lowest.rate * lowest.e2e_s <= ALONE:
                    return None
            report(rate, "running")
            probe = self.prober.at(rate, knee=knee)
            tried[rate] = holds(probe)
            report(rate, probe.state)
            return tried[rate]

        search(
            at,
            () if first is None else (readable(first),),
            tried,
            near=near or 1 + self.prober.effort.tolerance,
            most=self.max_rate,
            rounded=readable,
        )

    def _halvings(self, low: float, high: float) -> int:
        """Probes until a bracket is narrow; of one that has an open end, as if it were a doubling."""
        ratio = high / low if low and math.isfinite(high) else 2.0
        return max(0, math.ceil(math.log2(math.log(ratio) / math.log1p(self.prober.effort.tolerance))))
