"""One probed request rate: its replications, and whether they meet the objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.binding import Evidence, Limits, evidence
from servecast.sim.metrics.confidence import Interval, t_interval, wilson
from servecast.sim.metrics.metrics import good_requests, latencies, series, statistic
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.saturation import Saturation, pooled, saturation
from servecast.sim.metrics.slo import SLO, Goodput
from servecast.sim.metrics.warmup import Warmup, select

State = Literal["pass", "fail", "inconclusive"]

WARMUP_SHARE = 0.2
ATTAINMENT = 0.95  # of requests, that must be good
TAIL_SAMPLES = 20
LEAST_REQUESTS = 1000
WINDOW_IN_E2E = 10.0


class Probe(Protocol):
    """Simulates (or drives) an open-loop load of ``num_requests`` at ``request_rate`` a second to its end.

    The same seed must give the same traffic at every rate but for the time scale, and more requests the
    same ones and then some (common random numbers: rates are then compared on equal terms).
    """

    def __call__(self, request_rate: float, seed: int, num_requests: int) -> Run: ...


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a rate must meet, all of it. attainment: the share of requests that must be good (0..1)."""

    slos: tuple[SLO, ...]
    goodput: Goodput | None = None
    attainment: float = ATTAINMENT

    def __post_init__(self) -> None:
        if not self.slos and self.goodput is None:
            raise InputError("no objective", where="--slo", fix="Give one, for example --slo ttft:p95:500.")
        if not 0 < self.attainment < 1:
            raise InputError(
                f"{self.attainment:g} is not a share between 0 and 1", where="--attainment", fix="Try 0.95."
            )

    @property
    def tail(self) -> float:
        """The smallest share of requests that decides: 0.05 for a p95."""
        shares = [1 - slo.percentile / 100 for slo in self.slos if slo.percentile is not None]
        if self.goodput is not None:
            shares.append(1 - self.attainment)
        return min(shares, default=0.1)


@dataclass(frozen=True, slots=True)
class Observation:
    """One replication, after its warm-up. values_ms: the statistic of each SLO, in their order.

    e2e_s: mean end-to-end latency. output_throughput: tokens/s of the requests that finished between
    the warm-up and the last arrival. max_running, max_waiting: over all replicas.
    """

    values_ms: tuple[float, ...]
    good: int
    requests: int
    saturation: Saturation
    e2e_s: float
    output_throughput: float
    kv_peak: float
    max_running: int
    max_waiting: int
    preemptions: int
    evidence: Evidence | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One objective at one rate. value and limit: milliseconds, or shares for a goodput."""

    objective: str
    limit: float
    value: Interval
    state: State


@dataclass(frozen=True, slots=True)
class ProbedRate:
    """A rate (requests/s) and what its replications say. num_requests: of a replication, warm-up included.

    reasons: why it fails or is undecided. The other fields are means over replications; peaks and
    preemptions are their maximum.
    """

    rate: float
    state: State
    verdicts: tuple[Verdict, ...]
    reasons: tuple[str, ...]
    saturated: bool
    completion_ratio: float
    output_throughput: float
    e2e_s: float
    kv_peak: float
    max_running: int
    max_waiting: int
    preemptions: int
    replications: int
    num_requests: int
    evidence: Evidence | None


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


def observe(
    probe: Probe, rate: float, seed: int, num_requests: int, objectives: Objectives, limits: Limits | None
) -> Observation:
    """Runs one replication and measures it.

    Raises:
        InputError: an SLO is on a latency that no request has, for instance TPOT with outputs of one token.
    """
    run = probe(rate, seed, num_requests)
    part = select(run, warmup=Warmup(share=WARMUP_SHARE))
    start = float(part.meta["start_s"])
    values = []
    for slo in objectives.slos:
        value = statistic(part, slo.metric, slo.statistic) * 1000
        if math.isnan(value):
            raise InputError(
                f"no request has a {slo.metric}",
                where=f"--slo {slo}",
                fix="Check that requests finish, and with more than one output token for tpot and itl.",
            )
        values.append(value)
    requests, steps = run.requests, part.steps
    end = float(requests["arrival"].max())
    inside = requests[(requests["finish"] > start) & (requests["finish"] <= end)]
    known = len(steps) > 0
    return Observation(
        values_ms=tuple(values),
        good=0 if objectives.goodput is None else good_requests(part, objectives.goodput),
        requests=len(part.requests),
        saturation=saturation(run, start_s=start),
        e2e_s=float(latencies(part.requests)["e2el"].mean()),
        output_throughput=float(inside["output_tokens"].sum()) / (end - start),
        kv_peak=float(steps["kv_usage"].max()) if known else math.nan,
        max_running=int(series(steps, "running").max()) if known else 0,
        max_waiting=int(series(steps, "waiting").max()) if known else 0,
        preemptions=int(part.requests["preemptions"].sum()),
        evidence=evidence(part, limits) if limits is not None and known else None,
    )


def judge(
    rate: float,
    num_requests: int,
    observations: Sequence[Observation],
    objectives: Objectives,
    confidence: float,
) -> ProbedRate:
    """Pass, fail or inconclusive at a two-sided confidence.

    An SLO passes where the whole t-interval of its statistic over the replications is at or below the
    limit, and fails where all of it is above. A goodput is judged the same way by the share of good
    requests, with the wider of the t-interval and Wilson's over all requests. A saturated rate fails:
    what was measured depends on how long one looks.
    """
    load = pooled([each.saturation for each in observations])
    verdicts = [
        _verdict(
            str(slo),
            t_interval([each.values_ms[index] for each in observations], confidence),
            slo.limit_ms,
        )
        for index, slo in enumerate(objectives.slos)
    ]
    if objectives.goodput is not None:
        verdicts.append(_goodput_verdict(observations, objectives.goodput, objectives.attainment, confidence))
    reasons = [_reason(verdict) for verdict in verdicts if verdict.state != "pass"]
    states = [verdict.state for verdict in verdicts]
    if load.saturated:
        reasons.append(f"saturated: {load.reason}")
        states.append("fail")
    state: State = "fail" if "fail" in states else "inconclusive" if "inconclusive" in states else "pass"
    found = [each.evidence for each in observations if each.evidence is not None]
    return ProbedRate(
        rate=rate,
        state=state,
        verdicts=tuple(verdicts),
        reasons=tuple(reasons),
        saturated=load.saturated,
        completion_ratio=load.completion_ratio,
        output_throughput=float(np.mean([each.output_throughput for each in observations])),
        e2e_s=float(np.mean([each.e2e_s for each in observations])),
        kv_peak=max(each.kv_peak for each in observations),
        max_running=max(each.max_running for each in observations),
        max_waiting=max(each.max_waiting for each in observations),
        preemptions=max(each.preemptions for each in observations),
        replications=len(observations),
        num_requests=num_requests,
        evidence=Evidence.mean(found) if found else None,
    )


def _verdict(objective: str, value: Interval, limit: float) -> Verdict:
    state: State = "pass" if value.high <= limit else "fail" if value.low > limit else "inconclusive"
    return Verdict(objective, limit, value, state)


def _goodput_verdict(
    observations: Sequence[Observation], goodput: Goodput, attainment: float, confidence: float
) -> Verdict:
    between = t_interval([each.good / each.requests for each in observations], confidence)
    good, total = sum(each.good for each in observations), sum(each.requests for each in observations)
    within = wilson(good, total, confidence)
    low, high = max(0.0, min(between.low, within.low)), min(1.0, max(between.high, within.high))
    value = replace(within, low=low, high=high)
    state: State = (
        "pass" if value.low >= attainment else "fail" if value.high < attainment else "inconclusive"
    )
    return Verdict(f"goodput {goodput}", attainment, value, state)


def _reason(verdict: Verdict) -> str:
    value, limit = f"{verdict.value.estimate:.4g}", f"{verdict.limit:g}"
    relation = "misses" if verdict.state == "fail" else "is too close to"
    return f"{verdict.objective}: {value} {relation} {limit}"
