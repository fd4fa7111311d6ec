"""Bracketed search over request rates: where they stop to pass, begin to fail, and saturate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from joblib import Parallel, delayed

from servecast.sim.metrics.binding import Limits
from servecast.sim.plan.effort import Effort
from servecast.sim.plan.judge import (
    LEAST_REQUESTS,
    Objectives,
    Observation,
    Probe,
    ProbedRate,
    judge,
    observe,
    requests_needed,
)

Progress = Callable[[float, str, float], None]

DIGITS = 4  # significant digits of a probed rate
TOO_SHORT = 1.25  # runs are repeated if they needed to be longer than this many times what they were
ALONE = 0.05  # mean requests in flight below which a request has the server to itself


@dataclass(slots=True)
class Prober:
    """Runs replications at a rate until it is decided, and remembers what it found.

    pool: joblib's Parallel, over which replications run; results do not depend on it. found: what is
    known, by rate. The other attributes are those of `capacity.plan`.
    """

    probe: Probe
    objectives: Objectives
    limits: Limits | None
    seed: int
    effort: Effort
    pool: Parallel
    found: dict[float, ProbedRate] = field(default_factory=dict)
    _e2e: tuple[float, float] | None = None  # largest sustained rate so far, its mean latency in s

    def at(self, rate: float, *, knee: bool = False) -> ProbedRate:
        """The verdict at a rate. knee: whether it saturates is all that matters, so the first number of
        replications is enough, but each of twice the least length."""
        if rate not in self.found:
            if knee:
                self.found[rate] = self._decide(rate, self.effort.replications[:1], 2 * LEAST_REQUESTS)
            else:
                self.found[rate] = self._decide(rate, self.effort.replications, LEAST_REQUESTS)
        return self.found[rate]

    def _decide(self, rate: float, looks: Sequence[int], least: int) -> ProbedRate:
        most = self.effort.max_requests
        if self._e2e is None:
            needed = requests_needed(self.objectives, rate, 0.0, most=most)
            self._e2e = (0.0, self._observe(rate, needed, range(1))[0].e2e_s)
        look_confidence = 1 - 2 * (1 - self.effort.confidence) / len(self.effort.replications)
        observations: list[Observation] = []
        needed = requests_needed(self.objectives, rate, self._e2e[1], least=least, most=most)
        for count in looks:
            observations += self._observe(rate, needed, range(len(observations), count))
            result = judge(rate, needed, observations, self.objectives, look_confidence)
            more = requests_needed(self.objectives, rate, result.e2e_s, least=least, most=most)
            if result.state != "fail" and more > TOO_SHORT * needed:  # latency has grown since the last rate
                needed, observations = more, self._observe(rate, more, range(count))
                result = judge(rate, needed, observations, self.objectives, look_confidence)
            if result.state != "inconclusive":
                break
        if not result.saturated and rate > self._e2e[0]:
            self._e2e = (rate, result.e2e_s)
        return result

    def _observe(self, rate: float, num_requests: int, numbers: range) -> list[Observation]:
        task = delayed(observe)
        found: list[Observation] = self.pool(
            task(self.probe, rate, self.seed + number, num_requests, self.objectives, self.limits)
            for number in numbers
        )
        return found


class RateSearch:
    """Doubling, then bisection on the logarithm of the rate, for each of the three boundaries.

    Args:
        prober: what is known of a rate; brackets end at a ratio of 1 + its effort's tolerance.
        max_rate: where doubling ends. progress: see `capacity.plan`.
    """

    def __init__(self, prober: Prober, *, max_rate: float, progress: Progress | None = None) -> None:
        self._prober, self._tolerance, self._max_rate = prober, prober.effort.tolerance, max_rate
        self._progress, self._done = progress, 0.0
        self._bisection = self._steps(1.0, 2.0)
        self._left = 2 * self._bisection + 2  # probes still expected: the answer's and the knee's bisections

    def run(self, start_rate: float) -> None:
        """All three boundaries, from a first guess."""
        self._bracket(min(start_rate, self._max_rate))
        best = self.largest_pass
        if best is not None:
            self._bisect(lambda probe: probe.state == "pass", below=best.rate)
            if self.smallest_fail is None and self.smallest_miss is not None:
                self._double(lambda probe: probe.state != "fail")
            self._bisect(lambda probe: probe.state != "fail", below=best.rate)
        self._left = self._bisection
        self._double(lambda probe: not probe.saturated, knee=True)
        self._bisect(lambda probe: not probe.saturated, below=0.0, knee=True)

    @property
    def probes(self) -> tuple[ProbedRate, ...]:
        """All probed rates, rising."""
        return tuple(probe for _, probe in sorted(self._prober.found.items()))

    @property
    def smallest_miss(self) -> ProbedRate | None:
        """The smallest rate that does not pass."""
        return next((probe for probe in self.probes if probe.state != "pass"), None)

    @property
    def smallest_fail(self) -> ProbedRate | None:
        return next((probe for probe in self.probes if probe.state == "fail"), None)

    @property
    def largest_pass(self) -> ProbedRate | None:
        """The largest rate that passes, with no rate below it that does not."""
        miss = self.smallest_miss
        passing = [probe for probe in self.probes if miss is None or probe.rate < miss.rate]
        return passing[-1] if passing else None

    def _bracket(self, rate: float) -> None:
        """Double while rates pass, or halve until one does or a request has the server to itself."""
        probe = self._at(rate)
        while probe.state == "pass" and probe.rate < self._max_rate:
            probe = self._at(min(2 * probe.rate, self._max_rate))
        while probe.state != "pass" and self.largest_pass is None and probe.rate * probe.e2e_s > ALONE:
            probe = self._at(probe.rate / 2)

    def _double(self, holds: Callable[[ProbedRate], bool], *, knee: bool = False) -> None:
        """Double from the largest probed rate until one does not hold."""
        while all(holds(probe) for probe in self.probes) and self.probes[-1].rate < self._max_rate:
            self._at(min(2 * self.probes[-1].rate, self._max_rate), knee=knee)

    def _bisect(self, holds: Callable[[ProbedRate], bool], *, below: float, knee: bool = False) -> None:
        """Bracket the smallest rate above ``below`` that does not hold."""
        while True:
            probes = [probe for probe in self.probes if probe.rate >= below]
            high = next((probe.rate for probe in probes if not holds(probe)), None)
            if high is None or high == probes[0].rate:
                return
            low = max(probe.rate for probe in probes if probe.rate < high)
            middle = _rounded(math.sqrt(low * high))
            if high <= low * (1 + self._tolerance) or not low < middle < high:
                return
            self._left = self._steps(low, high) + (0 if knee else self._bisection)
            self._at(middle, knee=knee)

    def _steps(self, low: float, high: float) -> int:
        return max(0, math.ceil(math.log2(math.log(high / low) / math.log1p(self._tolerance))))

    def _at(self, rate: float, *, knee: bool = False) -> ProbedRate:
        rate = _rounded(rate)
        self._report(rate, "running")
        probe = self._prober.at(rate, knee=knee)
        self._left = max(self._left - 1, 1)
        self._report(rate, probe.state)
        return probe

    def _report(self, rate: float, state: str) -> None:
        if self._progress is not None:
            known = len(self._prober.found)
            self._done = max(self._done, known / (known + self._left))
            self._progress(rate, state, self._done)


def _rounded(rate: float) -> float:
    return float(f"{rate:.{DIGITS}g}")
