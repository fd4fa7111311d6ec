"""Plots of a comparison: prediction and measurement over each other, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from servecast.sim.metrics.metrics import METRICS, percentiles, samples
from servecast.sim.report.drawing import BAD, FIRST, INK, MUTED, SECOND, drawing
from servecast.validate.compare.load import LoadComparison, spoken
from servecast.validate.compare.samples import LATENCIES

_SHARES = np.linspace(0.0, 100.0, 201)
_FARTHEST = 6.0  # tolerances: what lies beyond is a triangle at the edge
_DRAWN = (  # statistics over the levels of a sweep
    ("median_ttft_ms", "TTFT p50, ms"),
    ("p95_ttft_ms", "TTFT p95, ms"),
    ("median_tpot_ms", "TPOT p50, ms"),
    ("output_throughput", "output tokens/s"),
)


def distributions(load: LoadComparison) -> str:
    """The share of requests (of tokens, for ITL) that had at most a latency."""
    shown = [metric for metric in LATENCIES if len(samples(load.measured.run, metric)[0])]
    with drawing(len(shown), f"distributions-{load.label}") as (axes, finish):
        for ax, metric in zip(axes, shown, strict=True):
            for run, color, label in (
                (load.predicted[0], FIRST, "predicted"),
                (load.measured.run, SECOND, "measured"),
            ):
                values, weights = samples(run, metric)
                if len(values):
                    quantiles = percentiles(values, _SHARES.tolist(), weights=weights)
                    ax.plot(1000 * np.array(quantiles), _SHARES, color=color, label=label)
            ax.set_title(METRICS[metric][0])
            ax.set_xlabel("ms")
            ax.set_ylabel("% at most")
            ax.set_ylim(0, 100)
            ax.legend(loc="lower right")
        return finish("Distributions of latencies, predicted and measured")


def engine_over_time(load: LoadComparison, series: tuple[pd.DataFrame, pd.DataFrame]) -> str:
    """Running, waiting and KV cache usage, at the times at which the live engine was asked."""
    panels = (
        ("running", "Running requests", 1),
        ("waiting", "Waiting requests", 1),
        ("kv_usage", "KV cache, %", 100),
    )
    shown = [panel for panel in panels if series[1][panel[0]].notna().any()]
    with drawing(len(shown), f"series-{load.label}") as (axes, finish):
        for ax, (name, title, scale) in zip(axes, shown, strict=True):
            for each, color, label in zip(series, (FIRST, SECOND), ("predicted", "measured"), strict=True):
                ax.plot(each["time_s"], scale * each[name], color=color, label=label, lw=1.2)
            ax.set_title(title)
            ax.set_xlabel("s")
            ax.set_ylim(0, max(1.0, 1.2 * ax.get_ylim()[1]))
            ax.legend(loc="upper left", ncols=2)
        return finish("The engine over time, predicted and measured")


def over_levels(levels: Sequence[float], loads: Sequence[LoadComparison], kind: str) -> str:
    """Figures of a sweep against its levels, with the intervals of both sides."""
    found = [{row.metric: row for row in load.rows} for load in loads]
    shown = [(key, title) for key, title in _DRAWN if all(key in rows for rows in found)]
    with drawing(len(shown), f"levels-{kind}") as (axes, finish):
        for ax, (key, title) in zip(axes, shown, strict=True):
            rows = [rows[key] for rows in found]
            for side, color in (("predicted", FIRST), ("measured", SECOND)):
                intervals = [getattr(row, side) for row in rows]
                low = np.array([each.low for each in intervals])
                high = np.array([each.high for each in intervals])
                ax.fill_between(levels, low, high, color=color, alpha=0.15, lw=0)
                ax.plot(levels, [each.estimate for each in intervals], "o-", color=color, label=side)
            ax.set_title(title)
            ax.set_xlabel(kind)
            ax.set_ylim(bottom=0)
            ax.legend(loc="upper left")
        return finish(f"Predicted and measured against {kind}")


def errors(load: LoadComparison) -> str:
    """The error of each judged row with its interval, in units of what is allowed."""
    rows = [row for row in load.rows if row.allowed]
    with drawing(1, f"errors-{load.label}") as ((ax,), finish):
        for place, row in enumerate(reversed(rows)):
            allowed = row.allowed or 1.0
            color = {"pass": INK, "fail": BAD, "inconclusive": MUTED}[row.state or "pass"]
            low, at, high = np.clip(
                np.array([row.difference.low, row.difference.estimate, row.difference.high]) / allowed,
                -_FARTHEST,
                _FARTHEST,
            )
            marker = "<" if at == -_FARTHEST else ">" if at == _FARTHEST else "o"
            ax.plot([low, high], [place, place], color=color, lw=1.4)
            ax.plot(at, place, marker, color=color, ms=5)
        ax.axvspan(-1, 1, color=FIRST, alpha=0.1, lw=0)
        ax.axvline(0, color=MUTED, lw=0.8)
        reach = min(_FARTHEST, max(1.5, *(abs(limit) for limit in ax.get_xlim())))
        ax.set_xlim(-reach, reach)
        ax.set_yticks(range(len(rows)), [spoken(row.metric).removesuffix(", ms") for row in reversed(rows)])
        ax.set_xlabel("error, in tolerances")
        return finish("Errors in units of their tolerances")
