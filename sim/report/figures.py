"""The report's plots, as inline SVG whose colours are the page's CSS variables."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from servecast.sim.metrics.metrics import Floats, percentiles, series
from servecast.sim.metrics.records import Run
from servecast.sim.plan.capacity import Plan
from servecast.sim.plan.judge import Verdict

# Stand-ins that Matplotlib draws with, and the CSS variables that replace them in the SVG.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
FIRST, SECOND, BAD = "#010206", "#010207", "#010208"
SERIES = (FIRST, SECOND, "#010209", "#01020a", "#01020b", "#01020c")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", BAD: "bad"}
_VARIABLES |= dict(zip(SERIES, ("first", "second", "third", "fourth", "fifth", "sixth"), strict=True))

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
PANEL_INCHES = (6.4, 3.0)
MAX_POINTS = 600  # of a time series
OVER_LIMIT = 2.5  # a latency plot ends at this multiple of its SLO


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One level of a closed-loop sweep: output tokens/s at a concurrency, and what was reported there."""

    concurrency: int
    output_throughput: float
    reported: float | None = None


def latency_by_rate(plan: Plan) -> str:
    """Each objective's statistic against the request rate, with its interval, its limit and the knee."""
    verdicts = [[probe.verdicts[i] for probe in plan.probes] for i in range(len(plan.probes[0].verdicts))]
    rates = np.array([probe.rate for probe in plan.probes])
    left, right = _rate_range(plan)
    with drawing(len(verdicts), "latency") as (axes, finish):
        for ax, at_rates in zip(axes, verdicts, strict=True):
            limit = at_rates[0].limit
            is_share = at_rates[0].objective.startswith("goodput")
            values = np.array([verdict.value.estimate for verdict in at_rates])
            top = 1.02 if is_share else OVER_LIMIT * limit
            inside = values <= top
            low, high = ([getattr(verdict.value, side) for verdict in at_rates] for side in ("low", "high"))
            ax.fill_between(rates, np.clip(low, 0, top), np.clip(high, 0, top), color=FIRST, alpha=0.15, lw=0)
            ax.plot(rates, np.minimum(values, top), color=FIRST)
            ax.plot(rates[inside], values[inside], "o", color=FIRST)
            above = rates[~inside & (rates <= right)]
            ax.plot(above, np.full(len(above), 0.99 * top), "^", color=FIRST)
            ax.axhline(limit, color=BAD, ls="--", lw=1.2)
            ax.annotate(
                f"objective {limit:.0%}" if is_share else f"SLO {limit:g} ms",
                (0, limit),
                xycoords=("axes fraction", "data"),
                xytext=(4, -3 if is_share else 3),
                textcoords="offset points",
                va="top" if is_share else "bottom",
                color=BAD,
                fontsize=9,
            )
            _mark(ax, plan.max_request_rate, "max", INK, 0.6 if is_share else 0.98)
            _mark(ax, plan.knee, "knee", MUTED, 0.5 if is_share else 0.88)
            ax.set_ylim(0, top)
            ax.set_title(spoken(at_rates[0]))
            ax.set_ylabel("share of requests" if is_share else "ms")
            ax.set_xlim(left, right)
            ax.set_xlabel("requests/s")
        return finish("Latency against request rate")


def throughput_by_rate(plan: Plan) -> str:
    """Output tokens/s against the request rate, and what they would be if every request completed."""
    rates = np.array([probe.rate for probe in plan.probes])
    tokens = np.array([probe.output_throughput for probe in plan.probes])
    ratios = np.array([probe.completion_ratio for probe in plan.probes])
    with drawing(1, "throughput") as ((ax,), finish):
        ax.plot(rates, tokens / ratios, color=MUTED, ls=":", label="if every request completed")
        ax.plot(rates, tokens, "o-", color=FIRST, label="delivered")
        _mark(ax, plan.max_request_rate, "max", INK, 0.98)
        _mark(ax, plan.knee, "knee", MUTED, 0.88)
        ax.set_ylim(0, 1.25 * tokens.max())
        ax.set_ylabel("output tokens/s")
        ax.legend(loc="lower right")
        ax.set_xlim(_rate_range(plan))
        ax.set_xlabel("requests/s")
        return finish("Output throughput against request rate")


def throughput_by_concurrency(sweep: Sequence[SweepPoint], knee: int | None) -> str:
    """Output tokens/s against the concurrency of a closed loop, predicted and reported."""
    levels = [point.concurrency for point in sweep]
    reported = [(p.concurrency, p.reported) for p in sweep if p.reported is not None]
    with drawing(1, "sweep") as ((ax,), finish):
        ax.plot(levels, [point.output_throughput for point in sweep], "o-", color=FIRST, label="predicted")
        if reported:
            ax.plot(*zip(*reported, strict=True), "D", color=SECOND, label="reported", fillstyle="none", ms=7)
            ax.legend(loc="lower right")
        ax.set_xscale("log", base=2)
        ax.set_xticks(levels, [str(level) for level in levels])
        ax.minorticks_off()
        _mark(ax, knee, "knee", MUTED, 0.98)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("concurrency")
        ax.set_ylabel("output tokens/s")
        return finish("Output throughput against concurrency")


def engine_over_time(run: Run) -> str:
    """Running and waiting requests, and KV cache usage, over a run."""
    with drawing(2, "engine") as ((queue, cache), finish):
        for column, color in (("running", FIRST), ("waiting", SECOND)):
            times, values = _thinned(series(run.steps, column))
            queue.plot(times, values, color=color, label=column, lw=1.2)
        queue.set_ylabel("requests")
        queue.set_title("Requests in the engine")
        queue.legend(loc="upper left", ncols=2)
        queue.set_ylim(0, 1.25 * max(queue.get_ylim()[1], 1))
        times, values = _thinned(series(run.steps, "kv_usage"))
        cache.plot(times, 100 * values, color=FIRST, lw=1.2)
        cache.set_ylabel("% of KV blocks")
        cache.set_title("KV cache in use")
        cache.set_ylim(0, min(100.0, max(1.0, 130 * float(values.max(initial=0.0)))))
        for ax in (queue, cache):
            ax.set_xlabel("s")
            ax.set_xlim(left=0)
        return finish("Requests and KV cache over time")


def itl_histogram(run: Run) -> str:
    """How the times between tokens are distributed, with their median and p95."""
    gaps, weights = run.itl["gap"].to_numpy(dtype=float) * 1000, run.itl["weight"].to_numpy(dtype=float)
    median, p95, end = percentiles(gaps, (50, 95, 99.9), weights=weights)
    with drawing(1, "itl") as ((ax,), finish):
        inside = gaps <= end
        counts, edges = np.histogram(gaps[inside], bins=60, range=(0, end), weights=weights[inside])
        ax.bar(edges[:-1], 100 * counts / weights.sum(), np.diff(edges), align="edge", color=FIRST, alpha=0.8)
        _mark(ax, median, f"p50 {median:.1f} ms", INK, 0.98, right=True)
        _mark(ax, p95, f"p95 {p95:.1f} ms", INK, 0.88, right=True)
        ax.set_xlim(0, end)
        ax.set_xlabel("ms, up to p99.9")
        ax.set_ylabel("% of tokens")
        ax.grid(visible=False, axis="x")
        return finish("Inter-token latency")


def spoken(verdict: Verdict) -> str:
    """An objective for people: "TTFT p95 ≤ 500 ms" for "ttft:p95:500"."""
    if verdict.objective.startswith("goodput "):
        limits = (limit.split(":") for limit in verdict.objective.removeprefix("goodput ").split())
        good = " and ".join(f"{name.upper()} ≤ {ms} ms" for name, ms in limits)
        return f"{verdict.limit:.0%} of requests with {good}"
    metric, statistic, limit = verdict.objective.split(":")
    return f"{metric.upper()} {statistic} ≤ {limit} ms"


def _rate_range(plan: Plan) -> tuple[float, float]:
    """From near the smallest rate to a little beyond the knee: what lies further is overload."""
    least, most = plan.probes[0].rate, plan.probes[-1].rate
    beyond = max((rate for rate in (plan.knee, plan.interval[1]) if rate is not None), default=most)
    right = 1.02 * min(most, 1.25 * beyond)
    return (0.9 * least if least > 0.3 * right else 0.0), max(right, 1.1 * least)


def _mark(ax: Axes, at: float | None, label: str, color: str, height: float, *, right: bool = False) -> None:
    """A labelled vertical line. height: of the label, as a fraction of the axis. right: of the line."""
    if at is None:
        return
    ax.axvline(at, color=color, lw=1, alpha=0.7)
    ax.annotate(
        label,
        (at, height),
        xycoords=("data", "axes fraction"),
        xytext=(4 if right else -4, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="top",
        color=color,
        fontsize=9,
    )


def _thinned(values: pd.Series[float]) -> tuple[Floats, Floats]:
    """A series with at most MAX_POINTS points: the largest of each stretch, so that peaks stay."""
    times, heights = np.asarray(values.index, dtype=np.float64), np.asarray(values, dtype=np.float64)
    size = -(-len(times) // MAX_POINTS)
    if size <= 1:
        return times, heights
    starts = np.arange(0, len(times), size)
    return times[starts], np.array([heights[at : at + size].max() for at in starts])


@contextmanager
def drawing(panels: int, salt: str) -> Iterator[tuple[list[Axes], Callable[[str], str]]]:
    """A figure of panels side by side, and the function that turns it into SVG with a given label.

    The figure is Matplotlib's object, without pyplot and its global state; the salt makes ids that are
    the same from run to run and differ between the figures of a page.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(PANEL_INCHES[0] * min(panels, 2), PANEL_INCHES[1] * -(-panels // 2)))
        figure.set_layout_engine("constrained")
        axes = [figure.add_subplot(-(-panels // 2), min(panels, 2), i + 1) for i in range(panels)]

        def finish(label: str) -> str:
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
            svg = out.getvalue()
            svg = svg[svg.index("<svg") :]
            svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, count=1, flags=re.DOTALL)
            svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
            svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{label}"', svg, count=1)
            for stand_in, name in _VARIABLES.items():
                svg = svg.replace(stand_in, f"var(--{name})")
            return svg

        yield axes, finish
