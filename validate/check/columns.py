"""What a column of somebody's table is, by its name: ``ttft_p95_ms``, ``Output tok/s``, ``P99 ITL (ms)``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from servecast.sim.inputs.errors import InputError
from servecast.validate.check.table import LATENCIES

Part = Literal["metric", "load", "key"]

_LOAD = {  # columns that say how the load was made
    "concurrency": ("concurrency", "max_concurrency", "conc", "users", "clients"),
    "request_rate": ("qps", "rate", "request_rate", "offered_rate", "target_rate"),
    "num_requests": ("requests", "reqs", "num_requests", "num_prompts", "completed"),
    "failed": ("errors", "err", "failed"),
    "output_tokens": ("output_tokens_mean", "output_tokens", "gen", "output_len", "osl"),
    "prompt_tokens": ("prompt_tokens", "input_tokens", "input_len", "isl"),
}
_METRIC = {  # metrics that are no latencies: their names without unit and statistic
    "request_throughput": "req_s requests_s req_per_s requests_per_s rps request_throughput throughput_req_s "
    "request_throughput_requests_sec request_throughput_req_s",
    "output_throughput": "output_tok_s output_toks_s out_tok_s tok_s tokens_s output_throughput "
    "throughput_tok_s output_tokens_per_s output_tokens_s output_token_throughput "
    "output_token_throughput_tokens_sec",
    "success": "success success_rate",
    "goodput": "goodput",
    "kv_usage": "kv kv_usage kv_cache kv_cache_usage",
    "running": "running num_requests_running",
    "waiting": "wait waiting wait_queue num_requests_waiting",
    "gpu_memory": "gpu_memory",
}
_METRIC_OF = {name: metric for metric, names in _METRIC.items() for name in names.split()}
_LATENCY = {name: name for name in LATENCIES} | {
    "e2e": "e2el",
    "latency": "e2el",
    "request_latency": "e2el",
    "time_to_first_token": "ttft",
    "time_per_output_token": "tpot",
    "inter_token_latency": "itl",
}
_STATISTIC = {name: name for name in ("mean", "max", "min", "std")}
_STATISTIC |= {"avg": "mean", "median": "p50", "p0": "min", "p100": "max"}
_UNIT = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "pct": 0.01, "percent": 0.01, "gib": float(1 << 30)}


@dataclass(frozen=True, slots=True)
class ColumnName:
    """What a name says. ``name`` is a metric, a load's field, or for a key the column itself; a value times
    ``scale`` is in SI."""

    part: Part
    name: str
    statistic: str | None = None
    scale: float = 1.0


def read_name(column: str) -> ColumnName:
    """What a column is; a key of its row where the name says nothing.

    Raises:
        InputError: it is a latency without a unit.
    """
    text = column.lower().replace("%", " pct ")
    words = [word for word in re.split(r"[^a-z0-9.]+", text) if word]
    whole = "_".join(words)
    for field, names in _LOAD.items():
        if whole in names:
            return ColumnName("load", field)
    said = [named for word in words if (named := read_statistic(word)) is not None]
    rest, scale = [word for word in words if read_statistic(word) is None], None
    if len(said) > 1 and said[1:] != ["mean"]:
        return ColumnName("key", column)  # the spread of a statistic over runs
    statistic = said[0] if said else None
    name = "_".join(rest)
    if name in _METRIC_OF:
        rate = _METRIC_OF[name].endswith("throughput") and statistic == "mean"
        return ColumnName("metric", _METRIC_OF[name], None if rate else statistic)
    if len(rest) > 1 and rest[-1] in _UNIT:
        scale = _UNIT[rest.pop()]
    name = "_".join(rest)
    if name in _METRIC_OF and scale is not None:
        return ColumnName("metric", _METRIC_OF[name], statistic, scale)
    if name not in _LATENCY:
        return ColumnName("key", column)
    if scale is None:
        raise InputError(
            f"column {column!r} has no unit", where=column, fix=f"Name it {column}_ms or {column}_s."
        )
    return ColumnName("metric", _LATENCY[name], statistic or "mean", scale)


def read_statistic(word: str) -> str | None:
    """The statistic that a word names (a median is a p50, a p100 the maximum), None for another word."""
    if word in _STATISTIC:
        return _STATISTIC[word]
    rank = re.fullmatch(r"p(\d+(\.\d+)?)", word)
    return word if rank is not None and 0 < float(rank[1]) < 100 else None
