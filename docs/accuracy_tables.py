"""Accuracy pages, from what ``servecast reproduce --json`` said of each scenario."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]

INTRODUCTION = """# Accuracy

What `servecast reproduce` says of the shipped scenarios: every number that the benchmark published,
beside the prediction. A profile is fitted to a few rows of a table, marked \\*; all other cells are
predictions, and only these enter the mean errors. Cells that a comparison must leave out
are numbered, with the reason below.

These are not blind predictions. The parameters come from the marked rows alone, but forms were chosen
with the tables in view; a live run predicted beforehand is the real test. What was chosen how:

- L4 and A6000, the front end: five forms of how requests are prepared were tried (first come first
  served, micro-batches, processor sharing, rounds, rounds of at most 32), and the one kept is both what
  vLLM's source suggests and what fits the L4's TTFT. The TTFT columns owe most to that.
- infer: two forms were taken from the server's public source after predicted rows had missed (keys and
  values are expanded to all query heads; the cost a row of the larger batch). Its error band is that of
  the predicted cells.
- RTX 4090: how the layer tables are fitted, and that the engine starts cold, was chosen with the whole
  run in view. Two host times come from the first 60 requests. Every variant that was tried gives the
  means within 0.7 %, and the first 20 requests' TTFT between +6 and +16 %.
- InferenceX: no row entered a fit; efficiencies come from timings of single kernels. Forms (the
  tokenizer behind the event loop, prompts bound by the host, shared experts launched beside the routed
  ones, as vLLM's source has it) and the token budget assumed for NVIDIA's runs were chosen with the
  rows in view, and the error bands are those of groups of rows that were left out. Which kernel
  multiplies the experts was looked up in vLLM's releases and in InferenceX's scripts after rows had missed:
  DeepGEMM in 0.12 (TPOT of Qwen3-235B-A22B-FP8 was 32 to 48 % off before), FlashInfer's CUTLASS in 0.16
  (MiniMax-M2.5 on four GPUs: 21 % before), Marlin for gpt-oss-120b (TTFT 27 % before). Their constants are
  from DeepGEMM's own table and NVIDIA's rows of single kernels.
- llm-d: two constants come from the rows marked, by steps that the scenario lists. The `default` router
  at 10 requests/s and above does not follow from the weights that the report prints; the scenario shows
  the printed weights and does not bend them.

Five single figures of other people's servers, of which little more than model, GPU, release and load is
known, and what kernel timings alone say of them:

| server | measured | predicted |
|---|---|---|
| Qwen3-0.6B, A100, vLLM 0.10, one client | TPOT 4.2 ms | 3.8 ms |
| Qwen3-30B-A3B, A100, 0.10, one client | TPOT 9.6 ms | 8.9 ms |
| Qwen3-30B-A3B, H100, 0.10, ten clients | TPOT 13.2 ms | 18.2 ms; 13.3 ms with `model.expert_skew: 1.2` |
| Qwen3-4B, H100, 0.19, 80 clients | 41.75 requests/s, TTFT 597 ms | 54.7 requests/s, TTFT 244 ms |
| Qwen3-8B, H200, 0.18, 64 clients of 9,000 tokens | ITL 309 ms | 196 ms |

The last three do not follow from what is stated. Ten tokens touch 61 of 128 experts if they choose
evenly, and reading these takes 8 of the 18 ms; 13.2 ms leave time for about 36, as alike prompts would
touch. 41.75 requests/s with 597 ms are a TPOT of 10.4 ms: a front end that prepares a request in 10 ms
instead of 0.9 gives TTFT 583 ms but 46 requests/s, and a cost of up to 0.15 ms a streamed token changes
neither, so that the front and each step were slower. An ITL of 309 ms under load is a step of that
length: at a budget of 8,192 tokens it means products at half of the peak, where those in 16 bits below
are met within 5 % with four fifths; at one of 12,288 tokens it is 289 ms.

Definitions, such as the percentile law of each source, are in [What is modelled](modelled.md).
"""

_CELL_FIELDS = ("metric", "reported", "predicted", "spread", "error_pct", "used", "reason", "true")
_WORDS = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "E2E",
    "gpu": "GPU",
    "kv": "KV",
    "req": "requests",
    "tok": "tokens",
}
_UNITS = {"s": "s", "ms": "ms", "pct": "%", "gib": "GiB"}


_FAMILIES = {  # column of the summary -> first words of the metrics in it
    "throughput": ("output", "throughput", "makespan"),
    "TTFT": ("TTFT",),
    "token times": ("TPOT", "ITL"),
    "E2E": ("E2E", "latency"),
}


def summary(documents: Sequence[Document]) -> str:
    """Mean absolute error of the predicted cells: a row a scenario, a column a family of metrics."""
    rows = [["scenario", "predicted cells", *_FAMILIES, "knee"]]
    for each in documents:
        errors = {name(metric)[0]: error for metric, error in each["mape_predicted"].items()}
        cells = sum(cell["used"] == "predicted" for cell in each["rows"])
        families = [_family(errors, words) for words in _FAMILIES.values()]
        rows.append([f"`{each['scenario']}`", str(cells), *families, _knee(each["knee"])])
    return "\n".join(table_lines(rows))


def _family(errors: Mapping[str, float], words: Sequence[str]) -> str:
    found = {}
    for metric, error in errors.items():
        first, _, statistic = metric.partition(" ")
        if first in words and error is not None:
            label = statistic if first in ("TTFT", "E2E", "latency") else metric
            found[label if label not in ("output tokens", "throughput tokens") else "tok/s"] = error
    return ", ".join(f"{label} {error:.1f} %" for label, error in found.items())


def page(documents: Sequence[Document]) -> str:
    """Every reported cell of every scenario beside its prediction."""
    return "\n\n".join([INTRODUCTION.rstrip(), *(_section(each) for each in documents)]) + "\n"


def name(metric: str) -> tuple[str, str]:
    """A column's name and unit for people: ttft_p95_ms is ("TTFT p95", "ms")."""
    *words, last = metric.split("_")
    if last == "s" and words[-1:] in (["tok"], ["req"]):
        return " ".join(_WORDS.get(word, word) for word in words), "/s"
    if last not in _UNITS:
        words, last = [*words, last], ""
    return " ".join(_WORDS.get(word, word) for word in words), _UNITS.get(last, "")


def _section(document: Document) -> str:
    provenance, scenario = document["provenance"], document["scenario"]
    band = "not known" if provenance["error_band"] is None else f"±{100 * provenance['error_band']:.0f} %"
    grouped = bool(document.get("mape_by_group"))
    lines = [f"## {scenario}", "", f"Source: {document['source']}.", ""]
    lines += [f"Profile: {provenance['profile']}; {provenance['basis']}; error band {band}. Predictions"]
    lines += [f"are means over {len(document['seeds'])} seeds.", ""]
    lines += _groups(document) if grouped else _table(document)
    if not grouped:
        lines += ["", f"Knee, concurrency: {_knee(document['knee'])}."]
    if ranking := document.get("ranking"):
        lines += ["", *_ranking(ranking, document["sustained"])]
    for title, table in document["tables"].items():
        own = [cell for cell in table["rows"] if cell not in document["rows"]]
        if own != table["rows"]:  # the mean is of all of them
            table = {**table, "rows": own, "mape_predicted": {}}
        lines += ["", f"### {scenario}: {title}", ""]
        lines += _groups(table) if table.get("mape_by_group") else _table(table)
    if document["run_context"]:
        rows = [[key, str(value)] for key, value in document["run_context"].items() if value]
        lines += ["", f"### {scenario}: run context", "", *table_lines([["", ""], *rows])]
    if document["assumptions"]:
        rows = [[each["name"], str(each["value"]), each["origin"]] for each in document["assumptions"]]
        lines += ["", f"### {scenario}: assumptions", "", *table_lines([["what", "value", "origin"], *rows])]
    return "\n".join(lines)


AISIMULATE = "TPOT 28.4 %, TTFT 76.7 %"  # as it publishes, means over 723 points
_KEYS = ("isl", "osl", "concurrency")


def _groups(table: Document) -> list[str]:
    """Errors of a table of closed loops by its groups: mean and median without their sign, and the median
    with it."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in table["rows"]:
        keys = {key: value for key, value in cell.items() if key not in _CELL_FIELDS}
        rows.setdefault(tuple(keys.items()), {})[cell["metric"].partition("_")[0]] = cell
    by_group: dict[str, dict[str, list[float]]] = {}
    for keys, row in rows.items():
        group = ", ".join(f"{key} {value}" for key, value in keys if key not in _KEYS)
        tokens = dict(keys)["osl"] - 1
        took = [row["ttft"][of] + tokens * row["tpot"][of] for of in ("reported", "predicted")]
        errors = {metric: cell["error_pct"] for metric, cell in row.items()}
        errors["throughput"] = 100 * (took[0] / took[1] - 1)
        for each in (group, "**all**"):
            for metric, error in errors.items():
                by_group.setdefault(each, {}).setdefault(metric, []).append(error)
    by_group["**all**"] = by_group.pop("**all**")
    header = [
        "",
        "runs",
        "TPOT mean",
        "TPOT median ±",
        "TTFT mean",
        "TTFT median",
        "TTFT median ±",
        "throughput mean",
    ]
    body = []
    for group, errors in by_group.items():
        mean = {metric: f"{statistics.fmean(map(abs, values)):.1f} %" for metric, values in errors.items()}
        signed = {metric: f"{statistics.median(values):+.1f} %" for metric, values in errors.items()}
        median = f"{statistics.median(map(abs, errors['ttft'])):.1f} %"
        cells = [mean["tpot"], signed["tpot"], mean["ttft"], median, signed["ttft"], mean["throughput"]]
        body.append([group, str(len(errors["tpot"])), *cells])
    inside = ", ".join(
        f"{name(metric)[0]} {100 * share:.0f} %" for metric, share in table["coverage"].items()
    )
    lines = [
        *table_lines([header, *body]),
        "",
        f"Inside the stated error band: {inside}. Throughput is what TTFT and",
    ]
    lines += [
        "TPOT make of it in a closed loop. AISimulate publishes mean errors of "
        + AISIMULATE
        + " over 723 points"
    ]
    lines += ["of mixtures of experts, so of other models."]
    lines += [""] if table["left_out"] or table.get("known_misses") else []
    lines += [
        f"- left out: {each['rows']} runs of {_named(each['row'])}: {each['reason']}"
        for each in table["left_out"]
    ]
    return lines + [f"- known miss: {miss}" for miss in table.get("known_misses", ())]


def _named(row: Mapping[str, Any]) -> str:
    return ", ".join(str(value) for value in row.values())


def _ranking(ranking: Document, sustained: Document) -> list[str]:
    """Which router is better, and what each carries."""
    wrong = [f"{pair['better']} over {pair['worse']} at {pair['row']}" for pair in ranking["wrong"]]
    held = [f"{name} {_rate(each['holds'])}" for name, each in sustained.items()]
    return [
        f"Ranking of the routers: {ranking['as_reported']} of {ranking['pairs']} pairs as reported, not "
        f"{' and '.join(wrong) or 'one'} ({ranking['ties']} more are ties). Largest of these rates that "
        f"holds, predicted: {', '.join(held)} requests/s."
    ]


def _rate(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:g}"


def _table(table: Document) -> list[str]:
    """Reported → predicted (error) by row and metric, and the mean error of the predicted cells."""
    metrics = list(dict.fromkeys(cell["metric"] for cell in table["rows"]))
    rows: dict[str, dict[str, str]] = {}
    reasons: list[str] = []
    for cell in table["rows"]:
        keys = [f"{key} {value}" for key, value in cell.items() if key not in _CELL_FIELDS]
        rows.setdefault(", ".join(keys) or "whole run", {})[cell["metric"]] = _compared(cell, reasons)
    header = ["", *(", ".join(part for part in name(metric) if part) for metric in metrics)]
    body = [[key, *(row.get(metric, "") for metric in metrics)] for key, row in rows.items()]
    errors = [_mape(table, metric) for metric in metrics]
    means = [["**mean error, predicted**", *errors]] if any(errors) else []
    lines = [*table_lines([header, *body, *means]), ""]
    lines += [f"{number}. excluded: {reason}" for number, reason in enumerate(reasons, start=1)]
    misses = [f"- known miss: {miss}" for miss in table.get("known_misses", ())]
    if reasons and misses:
        lines.append("")
    lines += misses
    return lines if reasons or misses else lines[:-1]


def _compared(cell: Mapping[str, Any], reasons: list[str]) -> str:
    text = f"{cell['reported']:g} → "
    text += "—" if cell["predicted"] is None else f"{cell['predicted']:.4g}"
    if cell["error_pct"] is not None:
        text += f" ({cell['error_pct']:+.1f} %)"
    if cell["used"] == "excluded":
        if cell["reason"] not in reasons:
            reasons.append(cell["reason"])
        text += f" [{reasons.index(cell['reason']) + 1}]"
    return text + (" \\*" if cell["used"] == "fit" else "")


def _mape(table: Document, metric: str) -> str:
    error = table["mape_predicted"].get(metric)
    return "" if error is None else f"**{error:.1f} %**"


def _knee(knee: Mapping[str, Any] | None) -> str:
    if knee is None:
        return "—"
    found = ["none" if knee[key] is None else knee[key] for key in ("concurrency", "reported_concurrency")]
    return f"{found[0]} (reported: {found[1]})"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first row is its header."""
    texts = [
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows
    ]
    return [texts[0], "|---" * len(rows[0]) + "|", *texts[1:]]
