"""A load as predicted, laid over the same load as measured: metric by metric, with how sure each error is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from servecast.sim.metrics.confidence import Interval, t_interval
from servecast.sim.metrics.metrics import METRICS, Floats, summary
from servecast.sim.metrics.records import Run
from servecast.sim.metrics.spec_decode import draft_summary
from servecast.validate.compare.attribution import Part, attribute, parts_of_recording, parts_of_run
from servecast.validate.compare.samples import (
    LATENCIES,
    RESAMPLES,
    STATISTICS,
    Distance,
    Draws,
    distances,
    resampled_statistics,
)
from servecast.validate.compare.series import figures_of, scraped, simulated
from servecast.validate.compare.tolerances import COUNTS, OF_SWEEPS, Tolerances
from servecast.validate.compare.verdict import State, Verdict, judge_row, verdict_of
from servecast.validate.readers import Reading

RANKS = (50, 90, 95, 99)
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Row:
    """A metric as predicted and as measured, in its unit (ms, a second, share, count).

    predicted: mean over the seeds, with Student's interval. measured: its interval is the bootstrap's,
    NaN where only the figure is known. difference: predicted less measured, with an interval over both.
    error: difference over the measured value, NaN where that is 0. allowed: None is not judged.
    """

    metric: str
    predicted: Interval
    measured: Interval
    difference: Interval
    allowed: float | None = None
    state: State | None = None

    @property
    def error(self) -> float:
        measured = self.measured.estimate
        return self.difference.estimate / measured if measured else math.nan

    @property
    def reason(self) -> str:
        """The row in a sentence."""
        part = f"{self.error:+.1%}" if not math.isnan(self.error) else f"{self.difference.estimate:+.4g}"
        return (
            f"{self.metric}: predicted {self.predicted.estimate:.4g}, measured {self.measured.estimate:.4g} "
            f"({part}; {self.allowed or 0:.3g} allowed)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {"metric": self.metric, "error": self.error}
        for name in ("predicted", "measured", "difference"):
            interval: Interval = getattr(self, name)
            found |= {name: interval.estimate, f"{name}_interval": [interval.low, interval.high]}
        return found | {"allowed": self.allowed, "state": self.state}


@dataclass(frozen=True, slots=True)
class ClientLag:
    """How much later than planned requests were sent, in ms, less the least of them; in a closed loop how
    much later than the answer that made room for each."""

    median_ms: float
    p95_ms: float
    max_ms: float

    @classmethod
    def of(cls, late_s: Floats) -> ClientLag | None:
        """Of what is known of each request, in s; None where that is nothing."""
        late = 1000 * late_s[~np.isnan(late_s)]
        if not len(late):
            return None
        return cls(float(np.median(late)), float(np.percentile(late, 95)), float(late.max()))

    @classmethod
    def behind(cls, sent_s: Floats, planned_s: Floats) -> ClientLag | None:
        """Of requests in the order of sending."""
        late = sent_s - planned_s
        return cls.of(late - late[~np.isnan(late)].min(initial=math.inf))

    def problems(self, tolerances: Tolerances) -> list[str]:
        """What it says about the worth of a measurement."""
        if self.p95_ms <= tolerances.client_lag_ms:
            return []
        return [
            f"the client was late: p95 of {self.p95_ms:.1f} ms between planned and actual sending, "
            f"{tolerances.client_lag_ms:g} ms allowed"
        ]


@dataclass(frozen=True, slots=True)
class LoadComparison:
    """One load. problems: why it says nothing about the prediction. notes: what to keep in mind.

    predicted: a run a seed; series: what the engine showed, predicted and measured, if known.
    attribution: where the error of the mean E2E comes from, if the engine's steps were recorded.
    """

    label: str
    rows: tuple[Row, ...]
    distances: tuple[Distance, ...]
    lag: ClientLag | None
    attribution: tuple[Part, ...]
    verdict: Verdict
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    predicted: tuple[Run, ...]
    measured: Reading
    series: tuple[pd.DataFrame, pd.DataFrame] | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "load": self.label,
            "verdict": self.verdict.state,
            "reasons": list(self.verdict.reasons),
            "rows": [row.to_json() for row in self.rows],
            "distances": [
                {"metric": d.metric, "ks": d.kolmogorov_smirnov, "wasserstein_ms": d.wasserstein_ms}
                for d in self.distances
            ],
            "client_lag_ms": None
            if self.lag is None
            else {"median": self.lag.median_ms, "p95": self.lag.p95_ms, "max": self.lag.max_ms},
            "attribution": [asdict(part) for part in self.attribution],
            "notes": list(self.notes),
        }


def compare_runs(
    predicted: Sequence[Run],
    measured: Reading,
    *,
    tolerances: Tolerances,
    telemetry: pd.DataFrame | None = None,
    recording: Path | None = None,
    planned_s: Floats | None = None,
    label: str | None = None,
    notes: Sequence[str] = (),
    rows: Sequence[Row] = (),
    seed: int = 0,
) -> LoadComparison:
    """Compare predictions of one load (a run a seed) with its measurement.

    Args:
        telemetry: columns of ``telemetry.METRICS`` by ``time_s`` of the measured run's own clock
            (``run.meta["clock_start_s"]`` is its start).
        recording: what calibrate/measure/vllm/recording_scheduler.py wrote beside the server.
        planned_s: when each request was to be sent, in the order of sending, from the trace; without it
            the reading's own, where the tool says it.
        notes: about the load, beside the reading's own. rows: further ones. seed: of the bootstrap.

    Raises:
        InputError: the recording is not one.
    """
    run = measured.run
    figures = {key: value for key, value in measured.figures().items() if isinstance(value, int | float)}
    figures |= {key: each for key, each in measured.reported.items() if key.startswith("spec_decode_")}
    series = None
    if telemetry is not None and len(telemetry):
        start = float(run.meta.get("clock_start_s", 0.0))
        end = float(run.requests["finish"].max()) if measured.has_requests else math.inf
        seen = scraped(telemetry, start_s=start, end_s=end)
        times = seen["time_s"].to_numpy(dtype=float)
        series = simulated(predicted[0], times), seen
        figures |= figures_of(seen)
    forecasts = [summary(each, ranks=RANKS) | draft_summary(each) for each in predicted]
    if series is not None:
        for forecast, each in zip(forecasts, predicted, strict=True):
            forecast |= figures_of(simulated(each, times))
    rng = np.random.default_rng(seed)
    resampled = resampled_statistics(run, predicted, rng) if measured.has_requests else {}
    keys = [f"{name}_{metric}_ms" for metric in LATENCIES for name in STATISTICS]
    found = [
        _row(
            key,
            [float(math.nan if f[key] is None else f[key]) for f in forecasts],
            float(figures[key]),
            resampled.get(key),
            tolerances,
            rng,
        )
        for key in [*COUNTS, *keys]
        if key in figures and all(forecast.get(key) is not None for forecast in forecasts)
    ]
    found += rows
    lag = _lag(measured, planned_s)
    problems = _problems(measured, figures, forecasts, lag, tolerances)
    verdict = verdict_of([(row.state, row.reason) for row in found if row.state is not None], problems)
    notes = [*measured.notes, *notes]
    judged = {row.metric for row in found if row.state is not None}
    missing = [name for name in tolerances.rows if name not in judged and name not in OF_SWEEPS]
    if missing:
        notes.append(f"not known of both, so not judged: {', '.join(missing)}")
    if not measured.has_requests:
        notes.append("figures as the tool reported them: without requests they have no intervals")
    return LoadComparison(
        label or measured.label,
        tuple(found),
        tuple(distances(predicted, run)) if measured.has_requests else (),
        lag,
        attribute(parts_of_run(predicted[0]), parts_of_recording(recording, run)) if recording else (),
        verdict,
        tuple(problems),
        tuple(notes),
        tuple(predicted),
        measured,
        series,
    )


def make_row(
    metric: str, predicted: Sequence[float], measured: Interval, difference: Interval, tolerances: Tolerances
) -> Row:
    """A row, judged if it has a tolerance."""
    tolerance = tolerances.rows.get(metric)
    forecast = t_interval(predicted, CONFIDENCE)
    if tolerance is None or math.isnan(difference.estimate):
        return Row(metric, forecast, measured, difference)
    allowed = tolerance.allowed(measured.estimate)
    state = judge_row(difference.estimate, difference.low, difference.high, allowed)
    return Row(metric, forecast, measured, difference, allowed, state)


def _row(
    metric: str,
    predicted: Sequence[float],
    measured: float,
    resampled: Draws | None,
    tolerances: Tolerances,
    rng: np.random.Generator,
) -> Row:
    """A row whose difference is uncertain by which requests there were, and by the seeds (Student's t).

    Where the measured figure has no bootstrap, as a count, it is one run more that may vary as the seeds do.
    """
    seeds = len(predicted)
    draws = np.empty(0)
    if resampled is not None or seeds > 1:
        draws = np.full(RESAMPLES, float(np.mean(predicted)) - measured)
        if resampled is not None:
            draws = resampled.predicted - resampled.measured
        if seeds > 1:
            more = 1.0 if resampled is None else 0.0
            error = float(np.std(predicted, ddof=1)) * math.sqrt(1 / seeds + more)
            draws = draws + error * rng.standard_t(seeds - 1, RESAMPLES)
    return make_row(
        metric,
        predicted,
        _interval(measured, None if resampled is None else resampled.measured),
        _interval(float(np.mean(predicted)) - measured, draws),
        tolerances,
    )


def _interval(estimate: float, draws: Floats | None) -> Interval:
    """The middle of what was drawn."""
    draws = np.empty(0) if draws is None else draws[~np.isnan(draws)]
    if not len(draws):
        return Interval(estimate, math.nan, math.nan, CONFIDENCE, 1)
    low, high = np.percentile(draws, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return Interval(estimate, float(low), float(high), CONFIDENCE, len(draws))


def _lag(measured: Reading, planned_s: Floats | None) -> ClientLag | None:
    """Against the plan of an open loop; of a closed one, how long a slot that came free was left empty."""
    if not measured.has_requests:
        return None
    requests = measured.run.requests.sort_values("sent", kind="stable")
    sent = requests["sent"].to_numpy(dtype=float)
    bound = measured.context.max_concurrency
    if planned_s is not None and len(planned_s) == len(sent):
        return ClientLag.behind(sent, np.sort(planned_s))
    if measured.planned:
        return ClientLag.behind(sent, requests["arrival"].to_numpy(dtype=float))
    if bound is None or measured.context.request_rate not in (None, math.inf):
        return None
    free = np.sort(requests["finish"].to_numpy(dtype=float))[: max(len(sent) - bound, 0)]
    return ClientLag.of(sent[bound:] - free)


def _problems(
    measured: Reading,
    figures: Mapping[str, float],
    forecasts: Sequence[Mapping[str, Any]],
    lag: ClientLag | None,
    tolerances: Tolerances,
) -> list[str]:
    problems = [] if lag is None else lag.problems(tolerances)
    done, failed = figures.get("completed"), figures.get("failed", 0)
    if done is not None:
        if done < tolerances.min_requests:
            problems.append(f"{done:.0f} requests finished, at least {tolerances.min_requests} are needed")
        if failed > tolerances.max_failed_share * (done + failed):
            problems.append(f"{failed:.0f} of {done + failed:.0f} requests failed")
    for name, total in (("prompt", "total_input_tokens"), ("output", "total_output_tokens")):
        if total not in figures or not done:
            continue
        ours = sum(forecast[total] for forecast in forecasts) / max(sum(f["completed"] for f in forecasts), 1)
        truth = figures[total] / done
        if abs(ours - truth) > tolerances.max_length_difference * max(truth, 1.0):
            problems.append(f"another traffic: {name}s of {ours:.1f} tokens predicted, {truth:.1f} measured")
    return problems


def spoken(metric: str) -> str:
    """A key for people: "TTFT p95, ms" for "p95_ttft_ms"."""
    statistic, _, rest = metric.partition("_")
    name = rest.removesuffix("_ms")
    if name in METRICS and statistic in STATISTICS:
        return f"{METRICS[name][0]} {'p50' if statistic == 'median' else statistic}, ms"
    return metric.replace("_", " ")
