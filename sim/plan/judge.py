"""The one judge: do runs at a rate meet the objectives?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from servecast.sim.inputs.errors import InputError
from servecast.sim.metrics.confidence import Interval, t_interval, wilson
from servecast.sim.metrics.metrics import good_requests, statistic
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.saturation import Saturation, pooled
from servecast.sim.metrics.slo import SLO, Goodput
from servecast.sim.scenario.scenario import Scenario

State = Literal["pass", "fail", "inconclusive"]

ATTAINMENT = 0.95  # of requests, that must be good
CERTAIN = 0.0  # the confidence at which estimates themselves decide, as if they were known for certain


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
            what = f"{self.attainment:g} is not a share between 0 and 1"
            raise InputError(what, where="--attainment", fix="Try 0.95.")

    @classmethod
    def of(cls, scenario: Scenario) -> Objectives | None:
        """A scenario's SLOs, or without any its goodput; None where it has neither."""
        goodput = None if scenario.slos else scenario.goodput_limits
        return cls(scenario.slos, goodput) if scenario.slos or goodput is not None else None

    @classmethod
    def asked(
        cls, scenario: Scenario, slo: str | Sequence[str] | None, goodput: str | None, attainment: float
    ) -> Objectives:
        """Those that are given, or the scenario's: its SLOs, and where it has none its goodput."""
        if slo is None and goodput is None and (own := cls.of(scenario)) is not None:
            return replace(own, attainment=attainment)
        texts = [slo] if isinstance(slo, str) else slo or ()
        good = None if goodput is None else Goodput.parse(goodput)
        return cls(tuple(SLO.parse(text) for text in texts), good, attainment)

    def __str__(self) -> str:
        asked = [str(slo) for slo in self.slos]
        return " and ".join(asked if self.goodput is None else [*asked, f"goodput {self.goodput}"])

    @property
    def tail(self) -> float:
        """The smallest share of requests that decides: 0.05 for a p95."""
        shares = [1 - slo.percentile / 100 for slo in self.slos if slo.percentile is not None]
        if self.goodput is not None:
            shares.append(1 - self.attainment)
        return min(shares, default=0.1)


@dataclass(frozen=True, slots=True)
class Observation:
    """What one run (or the part of it that counts) says of objectives. values_ms: the statistic of each SLO,
    in their order. good: requests that meet the goodput, of so many requests. load: whether the load was
    sustained, None where that is not asked."""

    values_ms: tuple[float, ...]
    good: int
    requests: int
    load: Saturation | None


@dataclass(frozen=True, slots=True)
class JudgedObjective:
    """One objective at one rate. value and limit: milliseconds, or shares for a goodput."""

    objective: str
    limit: float
    value: Interval
    state: State


@dataclass(frozen=True, slots=True)
class Judgement:
    """reasons: why the state is not "pass". load: over all runs, None where that was not asked. strain: how
    much of its limit the worst objective takes up: at most 1 meets all."""

    state: State
    verdicts: tuple[JudgedObjective, ...]
    reasons: tuple[str, ...]
    load: Saturation | None
    strain: float


def observed(run: Run, objectives: Objectives, *, load: Saturation | None = None) -> Observation:
    """A run (or the part of it that counts) against objectives."""
    return Observation(
        values_ms=tuple(taken_ms(run, slo) for slo in objectives.slos),
        good=0 if objectives.goodput is None else good_requests(run, objectives.goodput),
        requests=len(run.requests),
        load=load,
    )


def taken_ms(run: Run, slo: SLO) -> float:
    """The statistic of an SLO in milliseconds, where a request that did not finish counts as one that took
    for ever. NaN if those that finished have no such latency."""
    requests = run.requests
    done = float((requests["status"] == "finished").mean()) if len(requests) else 0.0
    rank = (100 if slo.percentile is None else slo.percentile) / max(done, 1e-9)  # of those that finished
    if rank > 100:
        return math.inf
    return 1000 * statistic(run, slo.metric, slo.statistic if slo.percentile is None else f"p{rank}")


def judge(observations: Sequence[Observation], objectives: Objectives, confidence: float) -> Judgement:
    """Pass, fail or inconclusive at a two-sided confidence.

    An SLO passes where the whole t-interval of its statistic over the runs is at or below the limit, and
    fails where all of it is above. A goodput is judged the same way by the share of good requests, with the
    wider of the t-interval and Wilson's over all requests. A load that was not sustained fails: what was
    measured depends on how long one looks. At confidence `CERTAIN` the means decide, and none is undecided.
    """
    verdicts = [
        _verdict(str(slo), [each.values_ms[index] for each in observations], slo.limit_ms, confidence)
        for index, slo in enumerate(objectives.slos)
    ]
    strains = [each.value.estimate / each.limit for each in verdicts]
    if objectives.goodput is not None:
        verdict = _goodput_verdict(observations, objectives.goodput, objectives.attainment, confidence)
        verdicts.append(verdict)
        strains.append((1 - verdict.value.estimate) / (1 - objectives.attainment))
    reasons = [_reason(verdict) for verdict in verdicts if verdict.state != "pass"]
    states = [verdict.state for verdict in verdicts]
    loads = [each.load for each in observations if each.load is not None]
    load = pooled(loads) if loads else None
    if load is not None and load.saturated:
        reasons.append(f"saturated: {load.reason}")
        states.append("fail")
    return Judgement(
        state="fail" if "fail" in states else "inconclusive" if "inconclusive" in states else "pass",
        verdicts=tuple(verdicts),
        reasons=tuple(reasons),
        load=load,
        strain=max(math.inf if math.isnan(strain) else strain for strain in strains),
    )


def _verdict(objective: str, values: Sequence[float], limit: float, confidence: float) -> JudgedObjective:
    """A latency that is not known, or endless, in one of the runs does not meet a limit."""
    if not all(map(math.isfinite, values)):
        return JudgedObjective(
            objective, limit, Interval(math.inf, math.inf, math.inf, confidence, len(values)), "fail"
        )
    value = t_interval(values, confidence)
    if confidence == CERTAIN:
        value = replace(value, low=value.estimate, high=value.estimate)
    state: State = "pass" if value.high <= limit else "fail" if value.low > limit else "inconclusive"
    return JudgedObjective(objective, limit, value, state)


def _goodput_verdict(
    observations: Sequence[Observation], goodput: Goodput, attainment: float, confidence: float
) -> JudgedObjective:
    good, total = sum(each.good for each in observations), sum(each.requests for each in observations)
    value = wilson(good, total, confidence)
    if confidence != CERTAIN:
        between = t_interval([each.good / each.requests for each in observations], confidence)
        low, high = max(0.0, min(between.low, value.low)), min(1.0, max(between.high, value.high))
        value = replace(value, low=low, high=high)
    state: State = (
        "pass" if value.low >= attainment else "inconclusive" if value.high >= attainment else "fail"
    )
    return JudgedObjective(f"goodput {goodput}", attainment, value, state)


def _reason(verdict: JudgedObjective) -> str:
    estimate, high = verdict.value.estimate, verdict.value.high
    value, limit = f"{estimate:{'.0f' if estimate >= 1000 else '.4g'}}", f"{verdict.limit:g}"
    if verdict.state == "fail":
        return f"{verdict.objective}: {value} misses {limit}"
    spread = f" +-{high - estimate:.3g}" if math.isfinite(high - estimate) else ", of too few runs,"
    return f"{verdict.objective}: {value}{spread} leaves {limit} open"
