"""The single-file pages of comparisons: of routers, their places, why, and the plots; else the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servecast.sim.compare.ranking import Ranking, Reason
from servecast.sim.compare.side_by_side import Document, Row, Side, SideBySide
from servecast.sim.metrics.metrics import Floats, gauges_at
from servecast.sim.metrics.records import Run
from servecast.sim.report.drawing import MUTED, SERIES, drawing
from servecast.sim.report.page import Plot, write_page, write_plain_page
from servecast.sim.report.text import cell_text

_POINTS = 400  # of a line over time
_BY_RATE = (  # metric, factor, axis, title; latencies have a logarithmic axis
    ("mean_ttft_ms", 1e-3, "s", "TTFT, mean"),
    ("p95_ttft_ms", 1e-3, "s", "TTFT, p95"),
    ("mean_e2el_ms", 1e-3, "s", "End-to-end latency, mean"),
    ("output_throughput", 1.0, "tokens/s", "Output throughput"),
)


@dataclass(frozen=True, slots=True)
class PodsOverTime:
    """A run's pods on a grid of times (s). waiting: requests; kv_usage: 0..1; both replicas x times."""

    times: Floats
    waiting: Floats
    kv_usage: Floats

    @classmethod
    def of(cls, run: Run) -> PodsOverTime:
        """The pods of a run, from its first step to its last."""
        last = float((run.steps["start"] + run.steps["duration"]).max()) if len(run.steps) else 0.0
        times = np.linspace(0.0, last, _POINTS)
        return cls(times, gauges_at(run, "waiting", times), gauges_at(run, "kv_usage", times))


def write_router_page(
    path: Path | str,
    sides: Sequence[Side],
    rankings: Sequence[Ranking],
    why: Sequence[Reason],
    pods: Mapping[str, PodsOverTime],
    *,
    title: str,
) -> Path:
    """Write the page of sides that saw the same traffic; whole or not at all.

    Args:
        pods: by label, of one run.
    """
    several = len(sides[0].results[0]["stages"]) > 1
    plots = []
    if several:
        caption = "Means over the seeds, a point a stage, at the rate at which its requests were sent."
        plots.append(Plot("Against the request rate", _by_rate(sides), caption, wide=True))
    for side in sides:
        caption = "One seed, each line a pod."
        plots.append(Plot(side.label, _over_time(pods[side.label], side.label), caption, wide=True))
    stages = list(dict.fromkeys(ranking.stage for ranking in rankings))
    return write_page(
        path,
        "servecast.sim.compare",
        title=title,
        labels=[side.label for side in sides],
        seeds=len(sides[0].results),
        stages=[(stage or "the whole run", _of(rankings, stage), _of(why, stage)) for stage in stages],
        replicas={side.label: side.results[0]["fleet_load"]["replicas"] for side in sides},
        plots=plots,
        document=sides[0].results[0],
    )


def write_comparison_page(path: Path | str, found: SideBySide, *, about: str, notes: Sequence[str]) -> Path:
    """Write the page of results side by side; whole or not at all. about: the model and its GPU."""
    first, *others = found.labels
    seeds = f"{found.seeds} seeds." if found.seeds > 1 else "One run of each."
    stages = dict.fromkeys(row.stage for row in found.rows)
    tables = []
    for stage in stages:
        header, cells = found.stage_rows(stage, all_metrics=True)
        tables.append((stage or "The figures", header, [list(map(cell_text, row)) for row in cells]))
    if found.differences:
        facts = [[each.field, *map(cell_text, each.values), each.may_explain] for each in found.differences]
        tables.append(("What differs between the runs", ["field", *found.labels, "may explain"], facts))
    rows = [row for row in found.shown() if row.stage == next(iter(stages)) and any(row.ratios[1:])]
    caption = f"Each figure over that of {first}, which is 1; of the first stage where there are several."
    svg = _ratios(rows, others) if others and rows else ""
    plots = [Plot(f"Against {first}", svg, caption)] if svg else []
    text = "\n".join(notes)
    title, subtitle = " against ".join(found.labels), f"{about} {seeds}".strip()
    return write_plain_page(path, title=title, subtitle=subtitle, plots=plots, tables=tables, text=text)


def _ratios(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """A bar a metric and side, from 1 on."""
    with drawing(1, "ratios") as ((ax,), finish):
        height = 0.8 / len(labels)
        for number, label in enumerate(labels):
            known = [(place, row.ratios[number + 1]) for place, row in enumerate(rows)]
            bars = [(place + number * height, ratio - 1) for place, ratio in known if ratio]
            places, lengths = zip(*bars, strict=True) if bars else ((), ())
            ax.barh(places, lengths, height, left=1.0, color=SERIES[number % len(SERIES)], label=label)
        ax.axvline(1.0, color=MUTED, lw=1)
        ax.set_yticks(np.arange(len(rows)) + 0.4 - height / 2, [row.metric for row in rows], fontsize=8)
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_xlabel("ratio")
        ax.legend(loc="best", fontsize=9)
        return finish("Figures of each side over those of the first")


def _of(entries: Sequence[Any], stage: str | None) -> list[Any]:
    return [entry for entry in entries if entry.stage == stage]


def _by_rate(sides: Sequence[Side]) -> str:
    with drawing(len(_BY_RATE), "rates") as (axes, finish):
        for ax, (metric, factor, unit, title) in zip(axes, _BY_RATE, strict=True):
            for number, side in enumerate(sides):
                rates, values = zip(*_points(side.results, metric), strict=True)
                color = SERIES[number % len(SERIES)]
                ax.plot(rates, [factor * value for value in values], "o-", color=color, label=side.label)
            ax.set(**{"yscale": "log"} if unit == "s" else {"ylim": (0, None)})
            ax.set(title=title, xlim=(0, None), xlabel="requests/s", ylabel=unit)
        axes[0].legend(loc="best", fontsize=9)
        return finish("Latency and throughput against request rate")


def _points(results: Sequence[Document], metric: str) -> list[tuple[float, float]]:
    """(rate, mean over the seeds) of each stage, by rising rate; NaN where not known."""
    points = []
    for number in range(len(results[0]["stages"])):
        stages = [document["stages"][number] for document in results]
        rates = [_number(stage["fleet_load"]["send_rate"]) for stage in stages]
        values = [_number(stage[metric]) for stage in stages]
        points.append((float(np.mean(rates)), float(np.mean(values))))
    return sorted(points)


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _over_time(pods: PodsOverTime, label: str) -> str:
    with drawing(2, f"pods {label}") as ((queue, cache), finish):
        for number, (waiting, usage) in enumerate(zip(pods.waiting, pods.kv_usage, strict=True)):
            color = SERIES[number % len(SERIES)]
            queue.plot(pods.times, waiting, color=color, lw=1.1)
            cache.plot(pods.times, 100 * usage, color=color, lw=1.1)
        top = max(1.0, 1.1 * float(pods.waiting.max(initial=0.0)))
        queue.set(title="Waiting requests", ylabel="requests", ylim=(0, top))
        cache.set(title="KV cache in use", ylabel="% of KV blocks", ylim=(0, 105))
        for ax in (queue, cache):
            ax.set(xlabel="s", xlim=(0, None))
        return finish("Waiting requests and KV cache over time")
