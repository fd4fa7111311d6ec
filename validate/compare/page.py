"""The single-file HTML page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
        sweep=[row_cells(row) for row in comparison.sweep],
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
        "rows": [row_cells(row) for row in load.rows],
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


def row_cells(row: Row) -> dict[str, Any]:
    """A row for people: intervals and errors as text, empty where there is none; what is allowed, empty where
    it is not judged."""
    measured, gap = row.measured.estimate, row.difference
    allowed = ""
    if row.allowed is not None:
        relative = row.allowed < abs(measured)
        allowed = f"±{row.allowed / abs(measured):.1%}" if relative else f"±{row.allowed:.3g}"
    return {
        "name": spoken(row.metric),
        "state": row.state,
        "predicted": row.predicted.estimate,
        "predicted_interval": _ends(row.predicted, "{:.4g}".format),
        "measured": measured,
        "measured_interval": _ends(row.measured, "{:.4g}".format),
        "error": _error(gap.estimate, measured),
        "error_interval": _ends(gap, lambda end: _error(end, measured)),
        "allowed": allowed,
    }


def _ends(interval: Interval, text: Callable[[float], str]) -> str:
    """ "12.1 to 13.4", empty where there is none."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return ""
    return f"{text(interval.low)} to {text(interval.high)}"


def _error(difference: float, measured: float) -> str:
    """In percent of the measured value, in its unit where that is 0."""
    return f"{difference / abs(measured):+.1%}" if measured else f"{difference:+.3g}"
