"""A request rate simulated until it is decided: as many replications, as long as that takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from joblib import Parallel, delayed

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import Evidence, Limits, evidence
from servecast.sim.metrics.metrics import Floats, latency, series
from servecast.sim.metrics.pools import pools_evidence
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.saturation import saturation
from servecast.sim.metrics.warmup import Warmup, select
from servecast.sim.plan.effort import LEAST_REQUESTS, Effort
from servecast.sim.plan.judge import (
    JudgedObjective,
    Judgement,
    Objectives,
    Observation,
    State,
    judge,
    observed,
)

WARMUP_SHARE = 0.2
TAIL_SAMPLES = 20
WINDOW_IN_E2E = 10.0
HERE = 300_000  # requests that are simulated in this process: a few seconds, as long as others take to start
_MEANS = ("output_throughput", "e2e_s", "tpot_s")  # of a rate, over its replications
_PEAKS = ("kv_peak", "max_running", "max_waiting", "preemptions")
TOO_SHORT = 1.25  # runs are repeated if they needed to be longer than this many times what they were


class Probe(Protocol):
    """Simulates (or drives) an open-loop load of ``num_requests`` at ``request_rate`` a second to its end.

    The same seed must give the same traffic at every rate but for the time scale, and more requests the
    same ones and then some (common random numbers: rates are then compared on equal terms).
    """

    def __call__(self, request_rate: float, seed: int, num_requests: int) -> Run: ...


@dataclass(frozen=True, slots=True)
class Replication:
    """One run at a rate, after its warm-up.

    observed: what is judged. e2e_s, tpot_s: mean latencies. output_throughput: tokens/s of the requests that
    finished between the warm-up and the last arrival. max_running, max_waiting: over all replicas.
    """

    observed: Observation
    e2e_s: float
    tpot_s: float
    output_throughput: float
    kv_peak: float
    max_running: int
    max_waiting: int
    preemptions: int
    evidence: Evidence | None


@dataclass(frozen=True, slots=True)
class ProbedRate:
    """A rate (requests/s) and what its replications say. num_requests: of a replication, warm-up included.

    reasons: why it fails or is undecided. The other fields are means over replications; peaks and
    preemptions are their maximum.
    """

    rate: float
    state: State
    verdicts: tuple[JudgedObjective, ...]
    reasons: tuple[str, ...]
    saturated: bool
    completion_ratio: float
    output_throughput: float
    e2e_s: float
    tpot_s: float
    kv_peak: float
    max_running: int
    max_waiting: int
    preemptions: int
    replications: int
    num_requests: int
    evidence: Evidence | None

    def to_json(self) -> dict[str, Any]:
        """Values as they are."""
        found = self.evidence
        return asdict(replace(self, evidence=None)) | {"evidence": None if found is None else found.to_json()}

    @classmethod
    def of(
        cls, rate: float, num_requests: int, replications: Sequence[Replication], judgement: Judgement
    ) -> ProbedRate:
        """Sums up replications, and what was judged of them."""
        load = judgement.load
        assert load is not None
        found = [each.evidence for each in replications if each.evidence is not None]
        over: dict[str, Any] = {
            **{name: float(np.mean([getattr(each, name) for each in replications])) for name in _MEANS},
            **{name: max(getattr(each, name) for each in replications) for name in _PEAKS},
        }
        return cls(
            rate=rate,
            state=judgement.state,
            verdicts=judgement.verdicts,
            reasons=judgement.reasons,
            saturated=load.saturated,
            completion_ratio=load.completion_ratio,
            **over,
            replications=len(replications),
            num_requests=num_requests,
            evidence=Evidence.mean(found) if found else None,
        )


def requests_needed(
    objectives: Objectives, rate: float, e2e_s: float, *, least: int = LEAST_REQUESTS, most: int
) -> int:
    """How many requests a replication sends.

    Three things want a number of requests. A percentile needs about 20 values beyond it to settle: 400
    for a p95, 2,000 for a p99. Saturation shows once the noise of Poisson arrivals, 1 / sqrt(n) of their
    number, is small against a shortfall of 2 %, which four times 1,000 requests are enough for (``least``).
    And the window must be long against a request's life, else one measures how the server fills and
    drains: at least ten times the mean end-to-end latency; ``most`` bounds this number alone.

    The first fifth, hence at least two and a half latencies, is cut as warm-up: by count rather than by
    looking at the data, so that the same requests count at every rate.
    """
    counted = max(math.ceil(TAIL_SAMPLES / objectives.tail - 1e-9), least)
    return math.ceil(max(counted, min(WINDOW_IN_E2E * e2e_s * rate, most)) / (1 - WARMUP_SHARE))


def replicate(
    probe: Probe, rate: float, seed: int, num_requests: int, objectives: Objectives, limits: Limits | None
) -> Replication:
    """Runs one replication and measures it.

    Raises:
        InputError: an SLO is on a latency that no request has, for instance TPOT with outputs of one token.
    """
    run = probe(rate, seed, num_requests)
    part = select(run, warmup=Warmup(share=WARMUP_SHARE))
    start = float(part.meta["start_s"])
    seen = observed(part, objectives, load=saturation(run, start_s=start))
    for slo, value in zip(objectives.slos, seen.values_ms, strict=True):
        if math.isnan(value):
            fix = "Check that requests finish, and with more than one output token for tpot and itl."
            raise InputError(f"no request has a {slo.metric}", where=f"--slo {slo}", fix=fix)
    steps, finish, end = part.steps, run.requests["finish"].to_numpy(), float(run.requests["arrival"].max())
    inside = run.requests["output_tokens"].to_numpy()[(finish > start) & (finish <= end)]
    known = len(steps) > 0
    return Replication(
        observed=seen,
        e2e_s=_mean(latency(part.requests, "e2el")),
        tpot_s=_mean(latency(part.requests, "tpot")),
        output_throughput=float(inside.sum()) / (end - start),
        kv_peak=float(steps["kv_usage"].max()) if known else math.nan,
        max_running=int(series(steps, "running").max()) if known else 0,
        max_waiting=int(series(steps, "waiting").max()) if known else 0,
        preemptions=int(part.requests["preemptions"].sum()),
        evidence=_evidence(part, limits) if limits is not None and known else None,
    )


def _mean(values: Floats) -> float:
    """Of those that are known, NaN where none is."""
    known = len(values) - np.count_nonzero(np.isnan(values))
    return float(np.nansum(values)) / known if known else math.nan


def _evidence(part: Run, limits: Limits) -> Evidence:
    return pools_evidence(part, limits) if limits.pools else evidence(part, limits)


@dataclass(slots=True)
class Prober:
    """Runs replications at a rate until it is decided, and remembers what it found.

    Replications run over processes once it pays, which results do not depend on. found: what is known, by
    rate. simulated: requests so far. The others are those of `capacity.plan`.
    """

    probe: Probe
    objectives: Objectives
    limits: Limits | None
    seed: int
    effort: Effort
    found: dict[float, ProbedRate] = field(default_factory=dict)
    simulated: int = 0
    _e2e: tuple[float, float] | None = None  # largest sustained rate so far, its mean latency in s

    @property
    def probes(self) -> tuple[ProbedRate, ...]:
        """All probed rates, rising."""
        return tuple(probe for _, probe in sorted(self.found.items()))

    def at(self, rate: float, *, knee: bool = False) -> ProbedRate:
        """The verdict at a rate. knee: whether it saturates is all that matters, so the first number of
        replications is enough, but each of twice the least length."""
        if rate not in self.found:
            if knee:
                self.found[rate] = self._decide(rate, self.effort.replications[:1], 2)
            else:
                self.found[rate] = self._decide(rate, self.effort.replications)
        return self.found[rate]

    def _decide(self, rate: float, looks: Sequence[int], longer: int = 1) -> ProbedRate:
        least, most = self.effort.least_requests, self.effort.max_requests
        if self._e2e is None:
            needed = requests_needed(self.objectives, rate, 0.0, least=least, most=most)
            self._e2e = (0.0, self._replicate(rate, needed, range(1))[0].e2e_s)
        replications, least = list[Replication](), longer * least
        needed = requests_needed(self.objectives, rate, self._e2e[1], least=least, most=most)
        for count in looks:
            replications += self._replicate(rate, needed, range(len(replications), count))
            result = self._judge(rate, needed, replications)
            more = requests_needed(self.objectives, rate, result.e2e_s, least=least, most=most)
            if result.state != "fail" and more > TOO_SHORT * needed:  # latency has grown since the last rate
                needed, replications = more, self._replicate(rate, more, range(count))
                result = self._judge(rate, needed, replications)
            if result.state != "inconclusive":
                break
        if not result.saturated and rate > self._e2e[0]:
            self._e2e = (rate, result.e2e_s)
        return result

    def _judge(self, rate: float, num_requests: int, replications: Sequence[Replication]) -> ProbedRate:
        look_confidence = 1 - 2 * (1 - self.effort.confidence) / len(self.effort.replications)
        judgement = judge([each.observed for each in replications], self.objectives, look_confidence)
        return ProbedRate.of(rate, num_requests, replications, judgement)

    def _replicate(self, rate: float, num_requests: int, numbers: range) -> list[Replication]:
        seeds = [self.seed + number for number in numbers]
        self.simulated += num_requests * len(seeds)
        rest = num_requests, self.objectives, self.limits
        if self.simulated <= HERE:
            return [replicate(self.probe, rate, seed, *rest) for seed in seeds]
        task = delayed(replicate)
        pool = Parallel(n_jobs=self.effort.jobs)
        found: list[Replication] = pool(task(self.probe, rate, seed, *rest) for seed in seeds)
        return found
