"""The plots of a run, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from servecast.sim.metrics.metrics import Floats, percentiles, series
from servecast.sim.metrics.records import Run
from servecast.sim.report.drawing import FIRST, INK, SECOND, drawing, mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 600  # of a time series


def draw_engine(run: Run, axes: Sequence[Axes]) -> None:
    """Running and waiting requests, and KV cache usage, over a run: two panels."""
    queue, cache = axes
    for column, color in (("running", FIRST), ("waiting", SECOND)):
        times, values = _thinned(series(run.steps, column))
        queue.plot(times, values, color=color, label=column, lw=1.2)
    top = 1.25 * max(queue.get_ylim()[1], 1)
    queue.set(title="Requests in the engine", ylabel="requests", ylim=(0, top))
    queue.legend(loc="upper left", ncols=2)
    most = 0.0
    for name, steps, color in _caches(run):
        times, values = _thinned(series(steps, "kv_usage"))
        cache.plot(times, 100 * values, color=color, lw=1.2, label=name)
        most = max(most, float(values.max(initial=0.0)))
    if "roles" in run.meta:
        cache.legend(loc="upper left", ncols=2)
    top = min(100.0, max(1.0, 130 * most))
    cache.set(title="KV cache in use", ylabel="% of KV blocks", ylim=(0, top))
    for ax in (queue, cache):
        ax.set(xlabel="s", xlim=(0, None))


def _caches(run: Run) -> list[tuple[str, pd.DataFrame, str]]:
    """Steps and colour of all caches together, or of those of each pool."""
    roles = run.meta.get("roles")
    if roles is None:
        return [("", run.steps, FIRST)]
    of = run.steps["replica"].map(dict(enumerate(roles)))
    return [(role, run.steps[of == role], color) for role, color in (("prefill", FIRST), ("decode", SECOND))]


def itl_histogram(run: Run) -> str:
    """How the times between tokens are distributed, with their median and p95."""
    gaps, weights = run.itl["gap"].to_numpy(dtype=float) * 1000, run.itl["weight"].to_numpy(dtype=float)
    median, p95, end = percentiles(gaps, (50, 95, 99.9), weights=weights)
    with drawing(1, "itl") as ((ax,), finish):
        inside = gaps <= end
        counts, edges = np.histogram(gaps[inside], bins=60, range=(0, end), weights=weights[inside])
        ax.bar(edges[:-1], 100 * counts / weights.sum(), np.diff(edges), align="edge", color=FIRST, alpha=0.8)
        mark(ax, median, f"p50 {median:.1f} ms", INK, 0.98, right=True)
        mark(ax, p95, f"p95 {p95:.1f} ms", INK, 0.88, right=True)
        ax.set(xlim=(0, end), xlabel="ms, up to p99.9", ylabel="% of tokens")
        ax.grid(visible=False, axis="x")
        return finish("Inter-token latency")


def _thinned(values: pd.Series[float]) -> tuple[Floats, Floats]:
    """A series with at most MAX_POINTS points: the largest of each stretch, so that peaks stay."""
    times, heights = np.asarray(values.index, dtype=np.float64), np.asarray(values, dtype=np.float64)
    size = -(-len(times) // MAX_POINTS)
    if size <= 1:
        return times, heights
    starts = np.arange(0, len(times), size)
    return times[starts], np.array([heights[at : at + size].max() for at in starts])
