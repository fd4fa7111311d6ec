"""Several loads together: do the knee, and the largest rate at the SLOs, lie where predicted?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from servecast.sim.confidence import Interval
from servecast.sim.knee import Saturation, closed_loop_knee, open_loop_knee, pooled, saturation
from servecast.sim.metrics import duration, statistic
from servecast.sim.probe import WARMUP_SHARE
from servecast.sim.records import Run
from servecast.sim.slo import SLO
from servecast.validate.compare_runs import CONFIDENCE, LoadComparison, Row
from servecast.validate.verdict import State, Tolerances, Verdict, judge_row, verdict_of


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
    slos: Sequence[SLO] = (),
    rows: Sequence[Row] = (),
) -> Comparison:
    """Put loads together.

    Args:
        slos: whose largest rate is looked for, by interpolation between the open-loop rates.
        rows: further ones about the whole, as a largest rate that was searched for on the live server
            (see ``bracket_row``); they replace ours of the same metric.
    """
    given = {row.metric for row in rows}
    found, notes = _knees(loads, tolerances)
    more, further = _max_rate(loads, slos, tolerances)
    sweep = [*(row for row in [*found, *more] if row.metric not in given), *rows]
    states: list[tuple[State, str]] = [(row.state, row.reason) for row in sweep if row.state is not None]
    states += [
        (load.verdict.state, f"{load.label}: {reason}") for load in loads for reason in _said(load.verdict)
    ]
    return Comparison(tuple(loads), tuple(sweep), tuple(notes + further), verdict_of(states, ()))


def _said(verdict: Verdict) -> Sequence[str]:
    return verdict.reasons or ("all within tolerance",)


def bracket_row(metric: str, predicted: Interval, measured: Interval, tolerances: Tolerances) -> Row:
    """A row about rates (or levels), each known to lie between a level that holds and one that does not."""
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
    state = judge_row(difference.estimate, difference.low, difference.high, allowed)
    return Row(metric, predicted, measured, difference, allowed, state)


def open_loop(loads: Sequence[LoadComparison]) -> list[tuple[float, LoadComparison]]:
    """The loads with a rate and no bound, by rate."""
    rates = [
        (rate, load)
        for load in loads
        if (rate := load.measured.context.request_rate) is not None
        and math.isfinite(rate)
        and load.measured.context.max_concurrency is None
        and load.measured.has_requests
        and not load.problems
    ]
    return sorted(rates, key=lambda pair: pair[0])


def closed_loop(loads: Sequence[LoadComparison]) -> list[tuple[float, LoadComparison]]:
    """The loads that only their concurrency bounds, by it."""
    levels = [
        (float(level), load)
        for load in loads
        if (level := load.measured.context.max_concurrency) is not None
        and load.measured.context.request_rate in (None, math.inf)
        and load.measured.has_requests
        and not load.problems
    ]
    return sorted(levels, key=lambda pair: pair[0])


def _knees(loads: Sequence[LoadComparison], tolerances: Tolerances) -> tuple[list[Row], list[str]]:
    rows, notes = [], []
    for levels, find, kind in (
        (open_loop(loads), _rate_knee, "rate"),
        (closed_loop(loads), _concurrency_knee, "concurrency"),
    ):
        swept = [level for level, _ in levels]
        if len(set(swept)) < 2:
            continue
        predicted = find(swept, [load.predicted for _, load in levels])
        measured = find(swept, [(load.measured.run,) for _, load in levels])
        if predicted is not None and measured is not None:
            rows.append(bracket_row("knee", predicted, measured, tolerances))
        elif predicted is None and measured is None:
            notes.append(f"no knee at these levels of {kind}, predicted or found")
        else:
            found, where = ("predicted", predicted) if measured is None else ("found", measured)
            if where is not None:
                notes.append(f"the knee is {found} at a {kind} of {where.estimate:g}, and only {found}")
    return rows, notes


def _rate_knee(rates: Sequence[float], runs: Sequence[Sequence[Run]]) -> Interval | None:
    full = [pooled([_saturation(run) for run in at_rate]).saturated for at_rate in runs]
    knee = open_loop_knee(rates, full)
    if knee is None:
        return None
    return Interval(knee, knee, min(rate for rate in rates if rate > knee), CONFIDENCE, len(runs))


def _concurrency_knee(levels: Sequence[float], runs: Sequence[Sequence[Run]]) -> Interval | None:
    concurrency = [int(level) for level in levels]
    knee = closed_loop_knee(concurrency, [_mean(_throughput(run) for run in at_level) for at_level in runs])
    if knee is None:
        return None
    below = max((level for level in concurrency if level < knee), default=knee)
    return Interval(
        float(knee), float(below), float(min(c for c in concurrency if c > knee)), CONFIDENCE, len(runs)
    )


def _saturation(run: Run) -> Saturation:
    """Behind the warm-up, in which any load fills the server; a request without a known arrival was sent
    at once, since nothing held it back."""
    arrival = run.requests["arrival"].fillna(run.requests["sent"])
    filled = replace(run, requests=run.requests.assign(arrival=arrival))
    return saturation(filled, start_s=float(arrival.quantile(WARMUP_SHARE)))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _throughput(run: Run) -> float:
    done = run.requests[run.requests["status"] == "finished"]
    return float(done["output_tokens"].sum()) / duration(run)


def _max_rate(
    loads: Sequence[LoadComparison], slos: Sequence[SLO], tolerances: Tolerances
) -> tuple[list[Row], list[str]]:
    levels = open_loop(loads)
    rates = [rate for rate, _ in levels]
    if not slos or len(set(rates)) < 2:
        return [], []
    predicted = _crossing(rates, [load.predicted for _, load in levels], slos)
    measured = _crossing(rates, [(load.measured.run,) for _, load in levels], slos)
    if predicted is None or measured is None:
        which = [name for name, found in (("predicted", predicted), ("measured", measured)) if found is None]
        return [], [f"the swept rates do not bracket the largest one at the SLOs ({' and '.join(which)})"]
    return [bracket_row("max_request_rate", predicted, measured, tolerances)], []


def _crossing(rates: Sequence[float], runs: Sequence[Sequence[Run]], slos: Sequence[SLO]) -> Interval | None:
    """Where the worst SLO's statistic, over its limit, passes 1: log-linear between the two rates around."""
    worst = [
        max(
            1000 * _mean(statistic(run, slo.metric, slo.statistic) for run in at_rate) / slo.limit_ms
            for slo in slos
        )
        for at_rate in runs
    ]
    over = next((i for i, share in enumerate(worst) if share > 1), None)
    if not over:
        return None
    low, high = rates[over - 1], rates[over]
    below, above = math.log(worst[over - 1]), math.log(worst[over])
    at = low + (high - low) * (-below) / (above - below)
    return Interval(float(np.clip(at, low, high)), low, high, CONFIDENCE, len(runs))
