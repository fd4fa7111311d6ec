"""Result files as a report: ours, and those of the load generators that `readers` knows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from servecast.sim.metrics import summary
from servecast.sim.records import Run
from servecast.sim.results import read_result
from servecast.validate.readers import read_all
from servecast.validate.report_of_table import Context
from servecast.validate.report_table import LATENCIES, Lengths, Level, Report, Value, exactly

_OUR_DEFINITIONS = ("vllm bench serve", "servecast simulate")


def from_results(paths: Sequence[Path], context: Context) -> Report:
    """Results of ``servecast simulate`` (a level a stage) or of a load generator that `readers` knows.

    Raises:
        InputError: a file is no such result.
    """
    levels: list[Level] = []
    notes: list[str] = []
    hardware = context.hardware()
    for path in paths:
        stages = _stages(path)
        for stage in stages:
            levels.append(_result_level(stage["stage"], stage, context, None))
        if stages:
            continue
        for reading in read_all(path):
            label = reading.source if len(paths) == 1 else path.stem
            load = {
                "request_rate": reading.context.request_rate,
                "max_concurrency": reading.context.max_concurrency,
            }
            # only vLLM's own figures have our definitions; those of others are computed again
            figures = dict(reading.reported)
            if reading.has_requests and reading.context.tool not in _OUR_DEFINITIONS:
                figures = reading.figures()
            run = reading.run if reading.has_requests else None
            levels.append(_result_level(label, {**figures, **load}, context, run))
            notes += [f"{label}: {note}" for note in reading.notes]
    return Report(
        ", ".join(map(str, paths)),
        tuple(replace(level, hardware=hardware) for level in levels),
        notes=tuple(dict.fromkeys(notes)),
    )


def _stages(path: Path) -> list[dict[str, Any]]:
    """The stages of a result of ours that has several."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # for a reader to tell
    ours = isinstance(document, dict) and "servecast_version" in document
    return list(read_result(path).get("stages") or []) if ours else []


def _result_level(label: str, figures: Mapping[str, Any], context: Context, run: Run | None) -> Level:
    """A level from figures under the keys of vllm bench serve, and the run that they sum up, if at hand."""
    named = dict(word.split("=", 1) for word in label.split() if "=" in word)
    rate = named.get("request_rate", figures.get("request_rate"))
    slots = named.get("concurrency", figures.get("max_concurrency"))
    completed = figures.get("completed")
    lengths = context.lengths()
    if run is not None:
        done = run.requests[run.requests["status"] == "finished"]
        for name in lengths:
            each = done[name].to_numpy(dtype=float)
            if len(each):
                lengths[name] = Lengths(exactly(float(each.mean())), bool(each.min() == each.max()))
    elif completed:
        for name, total in (
            ("output_tokens", "total_output_tokens"),
            ("prompt_tokens", "total_input_tokens"),
        ):
            if figures.get(total):
                lengths[name] = Lengths(exactly(figures[total] / completed), False)
    values = {
        place: Value(key, *place, number, abs(number) * 1e-9) for key, place, number in _figures(figures)
    }
    again = {} if run is None else summary(run, ranks=(50, 90, 95, 99))
    return Level(
        table="result",
        keys={"stage" if named else "run": label},
        series=(),
        values=values,
        concurrency=None if slots is None else int(slots),
        request_rate=float(rate) if rate is not None and math.isfinite(float(rate)) else None,
        num_requests=None if completed is None else int(completed),
        failed=figures.get("failed"),
        output=lengths["output_tokens"],
        prompt=lengths["prompt_tokens"],
        law=context.law,
        records={place: number for _, place, number in _figures(again)},
    )


def _figures(figures: Mapping[str, Any]) -> Iterable[tuple[str, tuple[str, str | None], float]]:
    """Key, (metric, statistic) and value in SI of what a result gives."""
    others = {
        "request_throughput": ("request_throughput", None),
        "output_throughput": ("output_throughput", None),
        "kv_cache_usage_peak": ("kv_usage", "max"),
        "max_num_running": ("running", "max"),
        "max_num_waiting": ("waiting", "max"),
    }
    for key, number in figures.items():
        if not isinstance(number, int | float) or not math.isfinite(number):
            continue
        statistic, _, rest = key.partition("_")
        metric = rest.removesuffix("_ms")
        if key in others:
            yield key, others[key], float(number)
        elif rest.endswith("_ms") and metric in LATENCIES:
            yield key, (metric, "p50" if statistic == "median" else statistic), number * 1e-3
