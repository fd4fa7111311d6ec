"""The page of live runs, from results/live-*.json: what ``servecast validate live`` wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from accuracy_tables import table_lines

from servecast.validate.compare.load import spoken

Document = Mapping[str, Any]

INTRODUCTION = """# Live runs

Predictions judged by a real vLLM: `servecast validate live` wrote each prediction to disk, then drove the
server with `vllm bench serve`, then compared. Every judged figure of every committed result is here, those
that fail (✗) or may be chance (?) included; the rest of each result, and its intervals, are in
`docs/results/`. How a run is judged is in [Check and validate](validate.md).

`metronome` is a vLLM whose steps last what a known law says (`tests/helpers/metronome.py`). Its HTTP server,
scheduler, KV cache and engine loop are the real ones: it judges all of servecast but the step times of a
GPU, and those are calibrated from outside, as a GPU's would be. `make live-results` measures it anew.
"""
_STATES = {"pass": "", "fail": " ✗", "inconclusive": " ?", None: ""}
_SUMMARY = {  # column -> metrics of a load
    "throughput": ("output_throughput",),
    "TTFT p50": ("median_ttft_ms",),
    "TTFT p95": ("p95_ttft_ms",),
    "TPOT p50": ("median_tpot_ms",),
    "TPOT p95": ("p95_tpot_ms",),
    "E2E p50": ("median_e2el_ms",),
    "E2E p95": ("p95_e2el_ms",),
}


def page(documents: Mapping[str, Document]) -> str:
    """Every committed live result, by the name of its file."""
    sections = [_section(name, each) for name, each in documents.items()]
    return "\n\n".join([INTRODUCTION.rstrip(), summary(documents), *sections]) + "\n"


def summary(documents: Mapping[str, Document]) -> str:
    """Mean absolute error over the loads: a row a result, a column a figure."""
    rows = [["live run", "loads", *_SUMMARY, "largest rate", "verdict"]]
    for name, each in documents.items():
        errors = [
            _mean_error([row for load in each["loads"] for row in load["rows"]], metrics)
            for metrics in _SUMMARY.values()
        ]
        largest = next((row for row in each["sweep"] if row["metric"] == "max_request_rate"), None)
        rate = "—" if largest is None or largest["error"] is None else f"{100 * largest['error']:+.1f} %"
        rows.append([f"`{name}`", str(len(each["loads"])), *errors, rate, each["verdict"]])
    return "\n".join(table_lines(rows))


def _mean_error(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    errors = [abs(row["error"]) for row in rows if row["metric"] in metrics and row["error"] is not None]
    return f"{100 * fmean(errors):.1f} %" if errors else "—"


def _section(name: str, document: Document) -> str:
    server, machine = document["server"] or {}, document["machine"]
    facts = [
        ["date", document["date"] or "—"],
        ["scenario", document["scenario"]],
        ["profile", f"{document['profile']}, SHA-256 {str(document['profile_sha256'])[:12]}…"],
        ["server", f"vLLM {server.get('version')}, {server.get('num_gpu_blocks')} KV blocks"],
        ["started with", f"`{document['server_started']}`"],
        ["load generator", document["load_generator"]],
        ["machine", ", ".join(str(machine[key]) for key in ("gpu", "host_cpu") if machine.get(key))],
        ["replications of a prediction", str(document["seeds"])],
    ]
    parts = [f"## {name}", "\n".join(table_lines([["", ""], *facts]))]
    reasons = "".join(f"\n- {reason}" for reason in document["reasons"])
    parts.append(f"Verdict: **{document['verdict']}**{'.' if not reasons else ', since'}{reasons}")
    if document["sweep"]:
        rows = [["", "predicted", "measured", "error", "verdict"]]
        rows += [
            [
                spoken(row["metric"]),
                _between(row["predicted"], row["predicted_interval"]),
                _between(row["measured"], row["measured_interval"]),
                _error(row),
                row["state"] or "not judged",
            ]
            for row in document["sweep"]
        ]
        parts.append("\n".join(table_lines(rows)))
    parts.append("\n".join(_loads(document["loads"])))
    if document["notes"]:
        parts.append("\n".join(f"- {note}" for note in document["notes"]))
    return "\n\n".join(parts)


def _loads(loads: Sequence[Mapping[str, Any]]) -> list[str]:
    """Predicted → measured (error) of each judged figure: a row a load."""
    judged = {row["metric"]: None for load in loads for row in load["rows"] if row["state"] is not None}
    metrics = [metric for metric in judged if any(_says(load, metric) for load in loads)]
    rows = [["load", *(spoken(metric) for metric in metrics)]]
    for load in loads:
        found = {row["metric"]: row for row in load["rows"]}
        rows.append([load["name"], *(_cell(found.get(metric)) for metric in metrics)])
    errors = [_mean_error([row for load in loads for row in load["rows"]], (metric,)) for metric in metrics]
    rows.append(["**mean error**", *(f"**{error}**" for error in errors)])
    return table_lines(rows)


def _says(load: Mapping[str, Any], metric: str) -> bool:
    """Whether a figure is more than a zero on both sides."""
    return any(row["metric"] == metric and (row["predicted"] or row["measured"]) for row in load["rows"])


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["predicted"] is None:
        return ""
    return f"{row['predicted']:.4g} → {row['measured']:.4g} ({_error(row)}){_STATES[row['state']]}"


def _error(row: Mapping[str, Any]) -> str:
    if row["error"] is not None and math.isfinite(row["error"]):
        return f"{100 * row['error']:+.1f} %"
    return "—" if row["difference"] is None else f"{row['difference']:+.3g}"


def _between(value: float, ends: Sequence[float | None]) -> str:
    low, high = ends
    return f"{value:.4g} ({low:.4g} to {'∞' if high is None else f'{high:.4g}'})"
