"""The llm-d Benchmark Report, version 0.2: a run as llm-d's tools read it.

Schema: llm-d-benchmark, analysis/benchmark_report/schema_v0_2.py. Latencies are in seconds. A report has no
place for single requests: it holds statistics alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from servecast.sim.inputs.files import write_whole
from servecast.sim.metrics.metrics import (
    Floats,
    counted,
    latencies,
    percentiles,
    prefix_hit_rate,
    samples,
    series,
)
from servecast.sim.metrics.records import Run

VERSION = "0.2"
_RANKS = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
RANKS = {f"p{rank:g}".replace(".", "p"): rank for rank in _RANKS}  # percentiles that a report gives, by name
LATENCIES = {  # the report's names, ours, and the unit
    "time_to_first_token": ("ttft", "s"),
    "time_per_output_token": ("tpot", "s/token"),
    "inter_token_latency": ("itl", "s/token"),
    "request_latency": ("e2el", "s"),
}
_ENGINE = "engine"  # label of the engine among the stack's components


def write_benchmark_report(path: Path, run: Run, document: Mapping[str, Any]) -> None:
    """Write `benchmark_report` as YAML, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    text = yaml.safe_dump(benchmark_report(run, document), sort_keys=False, allow_unicode=True)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def benchmark_report(run: Run, document: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a simulated run.

    Args:
        document: the run's result, as ``results.result`` gives it: what was run, and with what.
    """
    done = run.requests[run.requests["status"] == "finished"]
    part, seconds = counted(run)
    rated = part.requests[part.requests["status"] == "finished"]
    tokens_in, tokens_out = (int(rated[name].sum()) for name in ("prompt_tokens", "output_tokens"))
    prompt = done["prompt_tokens"].to_numpy(dtype=np.float64)
    output = done["output_tokens"].to_numpy(dtype=np.float64)
    rates = {
        "input_token_rate": (tokens_in, "tokens/s"),
        "output_token_rate": (tokens_out, "tokens/s"),
        "total_token_rate": (tokens_in + tokens_out, "tokens/s"),
        "request_rate": (len(rated), "queries/s"),
    }
    aggregate: dict[str, Any] = {
        "requests": {
            "total": len(run.requests),
            "failures": int(run.requests["status"].isin(("failed", "aborted")).sum()),
            **_present(
                input_length=_statistics(prompt, unit="count"),
                output_length=_statistics(output, unit="count"),
            ),
        },
        "latency": _present(
            **{
                name: _statistics(*samples(run, metric), unit=unit)
                for name, (metric, unit) in LATENCIES.items()
            },
            normalized_time_per_output_token=_statistics(
                np.asarray(latencies(done)["e2el"] / np.maximum(output, 1), dtype=np.float64), unit="s/token"
            ),
        ),
    }
    if len(done) and seconds > 0:
        aggregate["throughput"] = {
            name: {"units": unit, "mean": float(amount) / seconds} for name, (amount, unit) in rates.items()
        }
    report: dict[str, Any] = {
        "version": VERSION,
        "run": {
            "uid": f"servecast-{_digest({'context': document, 'results': aggregate})}",
            "description": f"Forecast by servecast {document['servecast_version']} of {document['scenario']}",
        },
        "scenario": {"stack": [_engine(document)], "load": _load(document, prompt, output)},
        "results": {"request_performance": {"aggregate": aggregate}},
    }
    if not math.isnan(seconds):
        report["run"]["time"] = {"duration": f"PT{seconds:.6f}S"}
    if len(run.steps):
        report["results"]["observability"] = {"components": [_observed(run)]}
    return report


def _engine(document: Mapping[str, Any]) -> dict[str, Any]:
    flags = {name: value for name, value in document["engine"].items() if value is not None}
    parallelism = {"tp": int(flags.get("tensor_parallel_size", 1))}
    for short, name in (("pp", "pipeline_parallel_size"), ("dp", "data_parallel_size")):
        if (size := int(flags.get(name, 1))) > 1:
            parallelism[short] = size
    replicas = int(document["fleet"]["replicas"])
    return {
        "metadata": {"label": _ENGINE, "cfg_id": _digest(document["engine"])},
        "standardized": {
            "kind": "inference_engine",
            "tool": "vllm",
            "tool_version": str(document["engine_version"]),
            "role": "replica",
            "replicas": replicas,
            "model": {"name": document["model_id"]},
            "accelerator": {
                "model": document["gpu"],
                "count": math.prod(parallelism.values()) * replicas,
                "parallelism": parallelism,
            },
        },
        "native": {"config": json.loads(json.dumps(flags, default=str))},
    }


def _load(document: Mapping[str, Any], prompt: Floats, output: Floats) -> dict[str, Any]:
    rate, concurrency = document.get("request_rate"), document.get("max_concurrency")
    standardized: dict[str, Any] = {
        "tool": "servecast",
        "tool_version": document["servecast_version"],
        "source": "unknown",
        **_present(input_seq_len=_lengths(prompt), output_seq_len=_lengths(output)),
    }
    if isinstance(rate, int | float) and math.isfinite(rate):
        standardized["rate_qps"] = float(rate)
    if concurrency is not None:
        standardized["concurrency"] = int(concurrency)
    return {
        "metadata": {"description": f"scenario {document['scenario']}"},
        "standardized": standardized,
        "native": {"config": {"scenario": document["scenario"], "seed": document["seed"]}},
    }


def _lengths(tokens: Floats) -> dict[str, Any]:
    if not len(tokens):
        return {"distribution": "other", "value": 0}
    fixed = tokens.min() == tokens.max()
    return {
        "distribution": "fixed" if fixed else "other",
        "value": float(tokens.mean()),
        "min": int(tokens.min()),
        "max": int(tokens.max()),
    }


def _observed(run: Run) -> dict[str, Any]:
    """What the engines show; statistics are over their steps."""
    usage = _statistics(run.steps["kv_usage"].to_numpy(dtype=np.float64), unit="fraction")
    counts = {
        f"{name}_requests": _statistics(np.asarray(series(run.steps, name), dtype=np.float64), unit="count")
        for name in ("running", "waiting")
    }
    hits = prefix_hit_rate(run.requests)
    rate = None if math.isnan(hits) else {"units": "fraction", "mean": hits}
    preemptions = {"units": "count", "mean": float(run.requests["preemptions"].sum())}
    return {
        "component_label": _ENGINE,
        "aggregate": _present(kv_cache_usage=usage, cache_hit_rate=rate, preemptions=preemptions, **counts),
    }


def _statistics(values: Floats, weights: Floats | None = None, *, unit: str) -> dict[str, Any] | None:
    """A report's statistics; None of an empty sample."""
    if not len(values):
        return None
    mean = float(np.average(values, weights=weights))
    ranks = percentiles(values, list(RANKS.values()), weights=weights)
    return {
        "units": unit,
        "mean": mean,
        "stddev": math.sqrt(float(np.average((values - mean) ** 2, weights=weights))),
        "min": float(values.min()),
        **dict(zip(RANKS, ranks, strict=True)),
        "max": float(values.max()),
    }


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
