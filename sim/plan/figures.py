"""The plots of a plan, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from servecast.sim.plan.capacity import Plan
from servecast.sim.plan.closed_loop import SweepPoint
from servecast.sim.plan.judge import JudgedObjective
from servecast.sim.report.drawing import BAD, FIRST, INK, MUTED, SECOND, drawing, mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OVER_LIMIT = 2.5  # a latency plot ends at this multiple of its SLO


def draw_latency(plan: Plan, axes: Sequence[Axes]) -> None:
    """Each objective's statistic against the request rate, with its interval, its limit and the knee."""
    verdicts = [[probe.verdicts[i] for probe in plan.probes] for i in range(len(axes))]
    rates = np.array([probe.rate for probe in plan.probes])
    left, right = _rate_range(plan)
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
        mark(ax, plan.max_request_rate, "max", INK, 0.6 if is_share else 0.98)
        mark(ax, plan.knee, "knee", MUTED, 0.5 if is_share else 0.88)
        ax.set(ylim=(0, top), title=spoken(at_rates[0]), ylabel="share of requests" if is_share else "ms")
        ax.set(xlim=(left, right), xlabel="requests/s")


def throughput_by_rate(plan: Plan) -> str:
    """Output tokens/s against the request rate, and what they would be if every request completed."""
    rates = np.array([probe.rate for probe in plan.probes])
    tokens = np.array([probe.output_throughput for probe in plan.probes])
    ratios = np.array([probe.completion_ratio for probe in plan.probes])
    with drawing(1, "throughput") as ((ax,), finish):
        ax.plot(rates, tokens / ratios, color=MUTED, ls=":", label="if every request completed")
        ax.plot(rates, tokens, "o-", color=FIRST, label="delivered")
        mark(ax, plan.max_request_rate, "max", INK, 0.98)
        mark(ax, plan.knee, "knee", MUTED, 0.88)
        ax.legend(loc="lower right")
        ax.set(ylim=(0, 1.25 * tokens.max()), ylabel="output tokens/s")
        ax.set(xlim=_rate_range(plan), xlabel="requests/s")
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
        mark(ax, knee, "knee", MUTED, 0.98)
        ax.set(ylim=(0, None), xlabel="concurrency", ylabel="output tokens/s")
        return finish("Output throughput against concurrency")


def loading(prompts: Sequence[Mapping[str, Any]]) -> str:
    """Seconds that loading the KV cache of a prompt takes, and computing it, against its length."""
    tokens = [each["tokens"] for each in prompts]
    with drawing(1, "loading") as ((ax,), finish):
        ax.plot(tokens, [1e3 * each["recompute_s"] for each in prompts], "o-", color=SECOND, label="compute")
        ax.plot(tokens, [1e3 * each["load_s"] for each in prompts], "o-", color=FIRST, label="load")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(tokens, [f"{each:,}" for each in tokens])
        ax.minorticks_off()
        ax.legend(loc="upper left")
        ax.set(xlabel="prompt tokens", ylabel="ms")
        return finish("Loading a prompt's KV cache against computing it")


def spoken(verdict: JudgedObjective) -> str:
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
