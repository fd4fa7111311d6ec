"""The single-file HTML page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from servecast.sim.metrics.confidence import Interval
from servecast.sim.report.page import Plot, write_page
from servecast.validate.compare import figures
from servecast.validate.compare.load import LoadComparison, Row, spoken
from servecast.validate.compare.sweep import Comparison, closed_loop, open_loop


def write_comparison_page(
    path: Path, comparison: Comparison, *, title: str, question: str, facts: Mapping[str, object]
) -> Path:
    """Write the page and return its path; it is written whole or not at all.

    Args:
        facts: provenance, shown as given.

    Raises:
        InputError: the file cannot be written.
    """
    return write_page(
        path,
        "servecast.validate.compare",
        title=title,
        question=question,
        comparison=comparison,
        sweep=[_cells(row) for row in comparison.sweep],
        sweep_plots=_sweep_plots(comparison),
        loads=[_load(load) for load in comparison.loads],
        facts=facts,
    )


def _sweep_plots(comparison: Comparison) -> list[Plot]:
    caption = "The bands are intervals of 95 %."
    found = []
    for levels, kind in (
        (open_loop(comparison.loads), "requests/s"),
        (closed_loop(comparison.loads), "concurrency"),
    ):
        if len({level for level, _ in levels}) > 1:
            svg = figures.over_levels([level for level, _ in levels], [load for _, load in levels], kind)
            found.append(Plot(f"Against {kind}", svg, caption, wide=True))
    return found


def _load(load: LoadComparison) -> dict[str, Any]:
    plots = []
    if any(row.allowed for row in load.rows):
        plots.append(Plot("Errors", figures.errors(load), "In units of what is allowed; the band passes."))
    if load.measured.has_requests:
        wide = Plot("Distributions", figures.distributions(load), "Predicted: the first seed.", wide=True)
        plots.append(wide)
    if load.series is not None:
        caption = "Predicted values are those at the times at which the engine was asked."
        svg = figures.engine_over_time(load, load.series)
        plots.append(Plot("The engine over time", svg, caption, wide=True))
    return {
        "label": load.label,
        "verdict": load.verdict,
        "rows": [_cells(row) for row in load.rows],
        "facts": [*load_facts(load), *load.notes],
        "plots": plots,
        "attribution": load.attribution,
    }


def load_facts(load: LoadComparison) -> list[str]:
    """What there is to say of a load beside its rows: client lag, and distances of the distributions."""
    facts = []
    if load.lag is not None:
        facts.append(
            f"client lag: median {load.lag.median_ms:.2g} ms, p95 {load.lag.p95_ms:.3g} ms, "
            f"most {load.lag.max_ms:.3g} ms"
        )
    facts += [
        f"{each.metric.upper()} distributions: Kolmogorov-Smirnov {each.kolmogorov_smirnov:.3f}, "
        f"Wasserstein {each.wasserstein_ms:.3g} ms"
        for each in load.distances
    ]
    return facts


def _cells(row: Row) -> dict[str, Any]:
    return {
        "name": spoken(row.metric),
        "state": row.state,
        "predicted": row.predicted.estimate,
        "predicted_interval": interval_text(row.predicted),
        "measured": row.measured.estimate,
        "measured_interval": interval_text(row.measured),
        "error": error_text(row),
        "error_interval": error_interval_text(row),
        "allowed": allowed_text(row),
    }


def interval_text(interval: Interval) -> str:
    """ "12.1 to 13.4", empty where there is none."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return ""
    return f"{interval.low:.4g} to {interval.high:.4g}"


def error_text(row: Row) -> str:
    """In percent of the measured value, in its unit where that is 0."""
    return _relative([row.difference.estimate], row.measured.estimate)


def error_interval_text(row: Row) -> str:
    """The interval of the error, empty where there is none."""
    low, high = row.difference.low, row.difference.high
    return "" if math.isnan(low) or math.isnan(high) else _relative([low, high], row.measured.estimate)


def allowed_text(row: Row) -> str:
    """The tolerance, empty where the row is not judged."""
    if row.allowed is None:
        return ""
    measured = abs(row.measured.estimate)
    return f"±{row.allowed / measured:.1%}" if row.allowed < measured else f"±{row.allowed:.3g}"


def _relative(values: Sequence[float], measured: float) -> str:
    if measured:
        return " to ".join(f"{value / abs(measured):+.1%}" for value in values)
    return " to ".join(f"{value:+.3g}" for value in values)
