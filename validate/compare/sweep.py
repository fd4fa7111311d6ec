"""Several loads together: do the knee, and the largest rate at the SLOs, lie where predicted?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from servecast.sim.metrics.confidence import Interval
from servecast.sim.metrics.knee import closed_loop_knee, ends
from servecast.sim.metrics.metrics import duration
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.saturation import Saturation, saturation
from servecast.sim.plan.judge import CERTAIN, Judgement, Objectives, judge, observed
from servecast.sim.plan.prober import WARMUP_SHARE
from servecast.validate.compare.load import CONFIDENCE, LoadComparison, Row
from servecast.validate.compare.tolerances import Tolerances
from servecast.validate.compare.verdict import State, Verdict, verdict_of

_STRAINS = 1e-3, 1e3  # between these, so that they have a logarithm


@dataclass(frozen=True, slots=True)
class Comparison:
    """All loads of a campaign, and what they show together: rows "knee" and "max_request_rate"."""

    loads: tuple[LoadComparison, ...]
    sweep: tuple[Row, ...]
    notes: tuple[str, ...]
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "verdict": self.verdict.state,
            "reasons": list(self.verdict.reasons),
            "sweep": [row.to_json() for row in self.sweep],
            "loads": [load.to_json() for load in self.loads],
            "notes": list(self.notes),
        }


def compare_loads(
    loads: Sequence[LoadComparison],
    *,
    tolerances: Tolerances,
    objectives: Objectives | None = None,
    predicted: Mapping[str, Interval] | None = None,
) -> Comparison:
    """Put loads together.

    Args:
        objectives: whose largest rate is looked for, by interpolation between the open-loop rates.
        predicted: metric -> where the prediction was found by a search of its own, instead of between the
            rates of the loads.
    """
    searched, levels = predicted or {}, open_loop(loads)
    found = [_closed_loop_knee(loads, tolerances)]
    if len({rate for rate, _ in levels}) > 1:
        rates, asked = [rate for rate, _ in levels], [load for _, load in levels]
        knees = [bracket(zip(rates, map(sustained, side), strict=True)) for side in _sides(asked)]
        found.insert(0, _compared("knee", "the knee", knees, searched, tolerances))
        if objectives is not None:
            most = [
                _crossing(rates, [judged(runs, objectives).strain for runs in side]) for side in _sides(asked)
            ]
            name = "the largest rate at the SLOs"
            found.append(_compared("max_request_rate", name, most, searched, tolerances))
    rows = [row for each, _ in found for row in each]
    notes = [note for _, each in found for note in each]
    states: list[tuple[State, str]] = [(row.state, row.reason) for row in rows if row.state is not None]
    states += [
        (load.verdict.state, f"{load.label}: {reason}")
        for load in loads
        for reason in load.verdict.reasons or ("all within tolerance",)
    ]
    return Comparison(tuple(loads), tuple(rows), tuple(notes), verdict_of(states, ()))


def bracket_row(metric: str, predicted: Interval, measured: Interval, tolerances: Tolerances) -> Row:
    """A row about rates, each known to lie between one that holds (0: none did) and one that does not (inf).

    It passes if the two lie within the tolerance wherever between their ends they are, fails if nowhere,
    and is not judged where the ends of one lie farther apart than the tolerance.
    """
    difference = Interval(
        predicted.estimate - measured.estimate,
        predicted.low - measured.high,
        predicted.high - measured.low,
        CONFIDENCE,
        1,
    )
    tolerance = tolerances.rows.get(metric)
    if tolerance is None:
        return Row(metric, predicted, measured, difference)
    allowed = tolerance.allowed(measured.estimate)
    state: State | None = "inconclusive"
    if difference.low > allowed or difference.high < -allowed:
        state = "fail"
    elif -allowed <= difference.low and difference.high <= allowed:
        state = "pass"
    elif max(each.high - each.low for each in (predicted, measured)) > allowed:
        state = None
    return Row(metric, predicted, measured, difference, allowed, state)


def open_loop(loads: Sequence[LoadComparison]) -> list[tuple[float, LoadComparison]]:
    """The loads with a rate and no bound, by rate."""
    rates = [
        (rate, load)
        for load in _telling(loads)
        if (rate := load.measured.context.request_rate) is not None
        and math.isfinite(rate)
        and load.measured.context.max_concurrency is None
    ]
    return sorted(rates, key=lambda pair: pair[0])


def closed_loop(loads: Sequence[LoadComparison]) -> list[tuple[float, LoadComparison]]:
    """The loads that only their concurrency bounds, by it."""
    levels = [
        (float(level), load)
        for load in _telling(loads)
        if (level := load.measured.context.max_concurrency) is not None
        and load.measured.context.ramp is None
        and load.measured.context.request_rate in (None, math.inf)
    ]
    return sorted(levels, key=lambda pair: pair[0])


def _telling(loads: Sequence[LoadComparison]) -> list[LoadComparison]:
    return [load for load in loads if load.measured.has_requests and not load.problems]


def _sides(loads: Sequence[LoadComparison]) -> tuple[list[tuple[Run, ...]], list[tuple[Run, ...]]]:
    """Predicted and measured runs, a tuple a load."""
    return [load.predicted for load in loads], [(load.measured.run,) for load in loads]


def _compared(
    metric: str,
    name: str,
    sides: Sequence[Interval],
    searched: Mapping[str, Interval],
    tolerances: Tolerances,
) -> tuple[list[Row], list[str]]:
    """The row of two brackets, predicted (by a search, if there was one) and measured, and what keeps it from
    saying more."""
    predicted, measured = searched.get(metric) or sides[0], sides[1]
    if predicted.high == measured.high == math.inf:
        return [], [f"{name} lies beyond {measured.low:g} requests/s, predicted and measured"]
    if predicted.low == measured.low == 0:
        return [], [f"{name} lies below {measured.high:g} requests/s, predicted and measured"]
    row = bracket_row(metric, predicted, measured, tolerances)
    if row.allowed is None or row.state is not None:
        return [row], []
    ends = [f"{each.low:g} and {each.high:g}" for each in (predicted, measured)]
    where = ends[0] if ends[0] == ends[1] else f"{ends[0]} (predicted), {ends[1]} (measured)"
    return [row], [
        f"{name} lies between {where} requests/s, too far apart to judge it to {row.allowed:.2g} requests/s"
    ]


def bracket(tried: Iterable[tuple[float, bool]]) -> Interval:
    """Between what rates it stops to hold (see `knee.ends`). tried: rates, and whether each holds; of several
    at one rate all must."""
    low, high = ends(dict(sorted(tried, reverse=True)))
    return Interval(low or high, low, high, CONFIDENCE, 1)


def sustained(runs: Sequence[Run]) -> bool:
    """Whether a rate is sustained, in most of the runs: by the test that a single run of a server gets."""
    return sum(not _saturation(run).saturated for run in runs) > len(runs) / 2


def _saturation(run: Run) -> Saturation:
    """Behind the warm-up, in which any load fills the server. Of both sides only what a client sees: a
    request waits until its first token, and arrived when it was sent if nothing tells when it should be."""
    arrival = run.requests["arrival"].fillna(run.requests["sent"])
    seen = replace(run, requests=run.requests.assign(arrival=arrival, scheduled=math.nan))
    return saturation(seen, start_s=float(arrival.quantile(WARMUP_SHARE)))


def _closed_loop_knee(loads: Sequence[LoadComparison], tolerances: Tolerances) -> tuple[list[Row], list[str]]:
    """The knee in concurrency is one of the swept levels; that of the next level could be chance."""
    swept = closed_loop(loads)
    levels = [level for level, _ in swept]
    if len(set(levels)) < 2:
        return [], []
    predicted, measured = (
        closed_loop_knee(
            [int(level) for level in levels],
            [float(np.mean([_throughput(run) for run in runs])) for runs in side],
        )
        for side in _sides([load for _, load in swept])
    )
    if predicted is None or measured is None:
        sides = {"predicted": predicted, "measured": measured}
        found = [f"{side} at {knee}" for side, knee in sides.items() if knee is not None]
        return [], [f"the knee in concurrency: {found[0]} only" if found else "no knee in concurrency"]

    def around(knee: int) -> Interval:
        below = max((level for level in levels if level < knee), default=knee)
        above = min((level for level in levels if level > knee), default=knee)
        return Interval(float(knee), float(below), float(above), CONFIDENCE, 1)

    row = bracket_row("knee", around(predicted), around(measured), tolerances)
    if row.allowed is None:
        return [row], []
    state: State = "pass" if predicted == measured else "fail" if row.state == "fail" else "inconclusive"
    return [replace(row, state=state)], []


def _throughput(run: Run) -> float:
    done = run.requests[run.requests["status"] == "finished"]
    return float(done["output_tokens"].sum()) / duration(run)


def judged(runs: Sequence[Run], objectives: Objectives) -> Judgement:
    """Runs of one load against objectives, each whole, as a client sees it, by their means: the runs of a
    prediction share the load's traffic, so that an interval over them would say nothing of other traffic."""
    return judge([observed(run, objectives) for run in runs], objectives, CERTAIN)


def _crossing(rates: Sequence[float], strains: Sequence[float]) -> Interval:
    """Where the strain passes 1: log-linear between the two rates around."""
    by_rate = dict(sorted(zip(rates, strains, strict=True)))  # of loads at one rate the worse
    found = bracket((rate, strain <= 1) for rate, strain in by_rate.items())
    if found.low == 0 or math.isinf(found.high):
        return found
    below, above = (math.log(np.clip(by_rate[end], *_STRAINS)) for end in (found.low, found.high))
    at = found.low + (found.high - found.low) * (-below) / (above - below) if above > below else found.low
    return replace(found, estimate=float(at))
